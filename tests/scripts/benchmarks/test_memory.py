import json
import os
import subprocess
import sys

import pytest
import torch

from ldm.util.cli import UserError
from ldm.util.config import ROOT
from scripts.benchmarks import memory
from scripts.benchmarks.memory import can_measure, measurable, peak, peak_here
from scripts.benchmarks.settings import MEMORY, TIMED, Settings
from scripts.benchmarks.timing import Case

MIB = 2**20
SETTINGS = Settings(size="pocket", latent=8)

pytestmark = pytest.mark.skipif(not can_measure(torch.device("cpu")), reason="the system does not tell peaks")

PROGRAM = """
import json
from contextlib import contextmanager
from types import SimpleNamespace
import torch
from scripts.benchmarks import memory
from scripts.benchmarks.settings import Settings
from scripts.benchmarks.timing import Case

def spike(mebibytes):
    return torch.ones(mebibytes * 2**20 // 4)

def instantiate(settings):
    spike(300)
    return SimpleNamespace(device=torch.device("cpu"), weights=spike(30))

@contextmanager
def ready():
    yield lambda steps: [spike(100) for _ in range(steps)] and None

memory.build_model = build
memory.memory_case = lambda name, sd, settings: Case(name, ready)
print(json.dumps(memory.peak_here("memory_image", Settings())))
"""


def test_a_peak_is_what_the_case_takes_at_most_after_the_model_was_built():
    """The model keeps 30 MiB and takes 300 while it is built; the case takes 100 twice, and keeps it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    assert 199 * MIB < found["above_loaded_bytes"] < 220 * MIB
    assert found["peak_bytes"] == found["loaded_bytes"] + found["above_loaded_bytes"]


def test_batch_and_checkpointing_are_those_of_the_name(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def case(name, sd, settings) -> Case:
        seen.append((name, settings.batch, settings.compile))
        return original(name, sd, settings)

    original = memory.memory_case
    monkeypatch.setattr(memory, "memory_case", case)
    found = peak_here("memory_train_batch_4_checkpointing", Settings(size="pocket", latent=8, batch=3, compile=True))
    peak_here("memory_guided_step", Settings(size="pocket", latent=8, batch=3))
    assert seen == [("memory_train_batch_4_checkpointing", 4, False), ("memory_guided_step", 3, False)]
    assert found["peak_bytes"] >= found["loaded_bytes"] > 20 * MIB


def test_names():
    assert not set(MEMORY) & set(TIMED)
    with pytest.raises(ValueError, match="memory_imgae"):
        peak("memory_imgae", SETTINGS)


def test_memory_is_left_out_where_it_cannot_be_measured(monkeypatch: pytest.MonkeyPatch):
    device, chosen = torch.device("cpu"), ["memory_image", "unet"]
    assert measurable(chosen, True, device) == chosen
    monkeypatch.setattr(memory, "can_measure", lambda device: False)
    assert measurable(chosen, False, device) == measurable(["unet"], True, device) == ["unet"]
    with pytest.raises(UserError, match="--only: memory_image is measured on CUDA and on Linux only"):
        measurable(chosen, True, device)


@pytest.mark.slow
def test_a_fresh_process_holds_nothing_of_this_one():
    ballast = torch.ones(3000 * MIB // 4)
    found = peak("memory_train_batch_1", SETTINGS)
    assert 20 * MIB < found["loaded_bytes"] < found["peak_bytes"] < ballast.nbytes
