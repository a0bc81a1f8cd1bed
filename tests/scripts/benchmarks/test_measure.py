import json
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from ldm.util.cli import UserError
from ldm.util.config import ROOT
from scripts.benchmarks import measure
from scripts.benchmarks.measure import benchmark, measurable, peak_here, ratio, summarise, table, take_turns, warm_up
from scripts.benchmarks.settings import MEMORY, TIMED, Settings, choose

SETTINGS, MIB = Settings(size="pocket", latent=8, batch=2, repeats=3), 2**20
PROGRAM = """
import json
from contextlib import contextmanager
from types import SimpleNamespace
import torch
from scripts.benchmarks import measure
from scripts.benchmarks.settings import Settings

def spike(mebibytes):
    return torch.ones(mebibytes * 2**20 // 4)

def build(settings):
    spike(300)
    return SimpleNamespace(device=torch.device("cpu"), weights=spike(30))

@contextmanager
def case(sd, settings):
    yield lambda steps: [spike(100) for _ in range(steps)] and None

measure.build_model = build
measure.CASES["memory_image"] = case
print(json.dumps(measure.peak_here("memory_image", Settings())))
"""


@pytest.fixture(scope="module")
def result() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measure.PEAK_SIDE, "cpu", 128)
        peak = {"peak_bytes": 3, "loaded_bytes": 2, "above_loaded_bytes": 1}
        patch.setattr(measure, "peak_memory", lambda name, settings: peak)
        return benchmark(
            SETTINGS, choose(["guided_step_with_concept_vs_base", "unet_vs_diffusers", MEMORY[1]]), "typed"
        )


def test_what_is_measured(result):
    cases = ["guided_step_base", "guided_step_one_concept", "unet", "unet_diffusers"]
    assert list(result["times"]) == list(result["flops"]) == list(result["utilisation"]) == cases
    assert result["command"] == "typed" and result["settings"]["cases"] == ["memory_image", *cases]
    assert result["device"]["torch"] == torch.__version__ and result["device"]["name"]
    for name, time in result["times"].items():
        assert time["n"] == 3 and 0 < time["q1_s"] <= time["median_s"] <= time["q3_s"]
        busy = result["flops"][name] / time["median_s"]
        assert result["utilisation"][name] * result["peak"]["flops_per_s"] == pytest.approx(busy)
    assert result["flops"]["unet"] * 2 == result["flops"]["guided_step_base"]  # guidance has two rows for each image
    found = result["ratios"]["guided_step_with_concept_vs_base"]
    medians = [result["times"][name]["median_s"] for name in cases[:2]]
    assert found["value"] == medians[1] / medians[0] and found["n"] == 3
    assert 1.3 < found["flops"] < 1.6  # three rows instead of two, of which one has no cross-attention of its own
    assert result["agreement"].keys() == {"unet_vs_diffusers"} and result["memory"]["peaks"].keys() == {"memory_image"}
    assert "VmHWM" in result["memory"]["how"] and "128 × 128" in result["peak"]["how"]


def test_the_table_has_a_line_for_each(result):
    lines = {line.split()[0]: line.split() for line in table(result).splitlines() if line}
    assert {*result["times"], *result["ratios"], "memory_image"} <= lines.keys()
    assert lines["guided_step_with_concept_vs_base"][-1] == (
        f"{result['ratios']['guided_step_with_concept_vs_base']['flops']:.3f}"
    )


def fake_cases(monkeypatch, clock, durations):
    """Cases that take so long on each run by a clock that stands still otherwise; making ready takes an hour."""

    def case(name):
        @contextmanager
        def ready(sd, settings):
            clock.now += 3600

            def run(steps):
                clock.ran.append((name, steps))
                clock.now += durations[name].pop(0)

            yield run

        return ready

    for name in durations:
        monkeypatch.setitem(measure.CASES, name, case(name))


def test_cases_take_turns_and_only_their_runs_are_timed(monkeypatch):
    clock, told = SimpleNamespace(now=0.0, ran=[]), []
    fake_cases(monkeypatch, clock, {"unet": [5.0, 1.0, 2.0], "image_50_steps": [7.0, 8.0, 90.0]})
    seconds = take_turns(["unet", "image_50_steps"], None, SETTINGS, told.append, lambda: clock.now)
    assert seconds == {"unet": [5, 1, 2], "image_50_steps": [7, 8, 90]} and told == ["unet", "image_50_steps"] * 3
    assert clock.ran == [("unet", 1), ("image_50_steps", 50)] * 3


def test_operations_of_many_steps_follow_from_two(monkeypatch):
    first, each, calls = torch.nn.Linear(8, 16), torch.nn.Linear(8, 3, bias=False), []

    @contextmanager
    def case(sd, settings):
        def run(steps):
            calls.append(steps)
            first(torch.ones(4, 8))
            for _ in range(steps):
                each(torch.ones(4, 8))

        yield run

    monkeypatch.setitem(measure.CASES, "image_50_steps", case)
    assert warm_up("image_50_steps", None, SETTINGS) == 2 * 4 * 8 * 16 + 50 * 2 * 4 * 8 * 3 and calls == [1, 2]


def test_medians_and_quartiles_are_of_rounds():
    """The machine is ten times slower in the last round: in the ratios of rounds it leaves no trace."""
    assert summarise([5.0, 1.0, 2.0, 4.0, 93.0]) == {"median_s": 4, "q1_s": 2, "q3_s": 5, "min_s": 1, "n": 5}
    assert ratio([2.0, 3.0, 20.0], [1.0, 1.5, 10.0]) == {"value": 2, "q1": 2, "q3": 2, "n": 3}
    assert ratio([1.0, 4.0, 4.0], [1.0, 2.0, 8.0]) == {"value": 2, "q1": 0.75, "q3": 1.5, "n": 3}


def test_other_predictions_than_diffusers_are_an_error(monkeypatch):
    @contextmanager
    def other(sd, settings):
        yield lambda steps: torch.ones(2)

    @contextmanager
    def ours(sd, settings):
        yield lambda steps: torch.full((2,), 1.1)

    monkeypatch.setitem(measure.CASES, "unet", ours)
    monkeypatch.setitem(measure.CASES, "unet_diffusers", other)
    with pytest.raises(RuntimeError, match="unet and unet_diffusers differ by 1.0e-01"):
        measure.check_agreement(SimpleNamespace(device=torch.device("cpu")), SETTINGS)


def test_a_peak_is_what_the_case_takes_at_most_after_the_model_was_built():
    """The model keeps 30 MiB and takes 300 while it is built; the case takes 100 twice, and keeps it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    assert 199 * MIB < found["above_loaded_bytes"] < 220 * MIB
    assert found["peak_bytes"] == found["loaded_bytes"] + found["above_loaded_bytes"]


def test_a_peak_of_training():
    found = peak_here("memory_train_batch_4_checkpointing", SETTINGS)
    assert found["peak_bytes"] >= found["loaded_bytes"] > 20 * MIB


def test_memory_is_left_out_where_it_cannot_be_measured(monkeypatch, tmp_path):
    device, chosen = torch.device("cpu"), ["memory_image", "unet"]
    assert measurable(chosen, True, device) == chosen
    monkeypatch.setattr(measure, "PROCESS", tmp_path)
    assert measurable(chosen, False, device) == measurable(["unet"], True, device) == ["unet"]
    with pytest.raises(UserError, match="--only: memory_image is measured on CUDA and on Linux only"):
        measurable(chosen, True, device)


def test_choosing():
    assert choose(None) == [*MEMORY, *(name for name in TIMED if name != "load")]
    assert choose(["unet", "memory_image"]) == ["memory_image", "unet"]
    assert choose(["unet_vs_diffusers", "unet"]) == ["unet", "unet_diffusers"]
    with pytest.raises(UserError, match="--only: there is no case `unett`; did you mean `unet`?"):
        choose(["unett"])
