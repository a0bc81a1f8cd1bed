"""The most memory that a case takes, and how much that is above what there is once the model has been built.

On CUDA it is what torch's allocator had given out at most (`torch.cuda.max_memory_allocated`). On a CPU every case has
a fresh process, of which the system remembers the largest resident set since it was told to forget (VmHWM, Linux). The
interpreter and the libraries count there, and so does what a first call brings in of them.
"""

import gc
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError
from scripts.benchmarks.cases import guided_step, images, train_step
from scripts.benchmarks.model import build_model
from scripts.benchmarks.settings import MEMORY, MEMORY_TRAINING, Settings
from scripts.benchmarks.timing import Case

PROCESS = Path("/proc/self")
FORGET = "5"  # what clear_refs takes to begin a new peak
HOW = {
    "cuda": "torch.cuda.max_memory_allocated; loaded: memory_allocated after the model was built",
    "cpu": "peak resident set of a fresh process (VmHWM); loaded: resident set after the model was built",
}


def can_measure(device: torch.device) -> bool:
    """Whether peaks can be measured here: on CUDA, and on Linux."""
    return device.type == "cuda" or os.access(PROCESS / "clear_refs", os.W_OK)


def measurable(chosen: Sequence[str], named: bool, device: torch.device) -> list[str]:
    """The cases without those of memory where it cannot be measured; UserError if they were asked for by name."""
    if can_measure(device):
        return list(chosen)
    if named and (asked := [name for name in chosen if name in MEMORY]):
        raise UserError(f"--only: {asked[0]} is measured on CUDA and on Linux only: leave it out")
    return [name for name in chosen if name not in MEMORY]


def peak(name: str, settings: Settings) -> dict[str, int]:
    """Bytes at the peak of a case, with the model built, and the former above the latter; nothing is compiled.

    Raises:
        ValueError: unknown case.
    """
    if name not in MEMORY:
        raise UserError(f"there is no memory case {name!r}; there are {', '.join(MEMORY)}")
    if torch.device(settings.device).type == "cuda":
        return peak_here(name, settings)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(peak_here, name, settings).result()


def peak_here(name: str, settings: Settings) -> dict[str, int]:
    """As `peak`, in this process, which should hold little else."""
    batch = MEMORY_TRAINING[name][0] if name in MEMORY_TRAINING else settings.batch
    settings = replace(settings, batch=batch, compile=False)
    sd = build_model(settings)
    gc.collect()
    cuda = sd.device.type == "cuda"
    loaded = _begin_cuda(sd.device) if cuda else _begin_process()
    with memory_case(name, sd, settings).ready() as run:
        run(2)  # the optimiser has its state from the second step on
    highest = torch.cuda.max_memory_allocated(sd.device) if cuda else status("VmHWM")
    highest = max(highest, loaded)  # the system counts the two some pages apart
    return {"peak_bytes": highest, "loaded_bytes": loaded, "above_loaded_bytes": highest - loaded}


def memory_case(name: str, sd: StableDiffusion, settings: Settings) -> Case:
    """What is run: a guided step with one concept, whole images with one (decoder included), or training steps."""
    if name == "memory_guided_step":
        return guided_step(sd, settings, name, 1)
    if name == "memory_image":
        return images(sd, settings)[0]
    return train_step(sd, settings, name, checkpointing=MEMORY_TRAINING[name][1])


def _begin_cuda(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _begin_process() -> int:
    (PROCESS / "clear_refs").write_text(FORGET)
    return status("VmRSS")


def status(key: str) -> int:
    """A line of this process's status, in bytes."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
