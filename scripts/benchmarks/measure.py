"""Seconds, operations and memory of cases: measured, or known from shapes alone."""

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config as shapes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ldm.pipeline import StableDiffusion
from scripts.benchmarks.cases import CASES, RATIOS, Settings

UNFUSED, WITH_VALUES = F.scaled_dot_product_attention, ("image", "unet_diffusers")  # cases that the meta device has not


def measure(sd: StableDiffusion, settings: Settings, names: Sequence[str]) -> dict[str, dict]:
    """`cases`: quartiles of seconds, operations and, on CUDA, bytes at the peak; `ratios` of seconds in each round."""
    cases = {name: warm_up(name, sd, settings) for name in tqdm(names, "warming up")}
    seconds = take_turns(tqdm(list(names) * settings.repeats, "rounds"), sd, settings)
    ratios = {
        name: quartiles(np.divide(seconds[a], seconds[b])) for name, (a, b) in RATIOS.items() if {a, b} <= {*names}
    }
    return {"cases": {name: quartiles(seconds[name]) | cases[name] for name in names}, "ratios": ratios}


def warm_up(name: str, sd: StableDiffusion, settings: Settings) -> dict[str, int]:
    """Runs a case for the first time. Operations are those of matrix products, convolutions and attention; a
    multiplication and an addition are two."""
    cuda = sd.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(sd.device)
    with CASES[name](sd, settings) as run, FlopCounterMode(display=False) as counter:
        run()
    peak = {"peak_bytes": torch.cuda.max_memory_allocated(sd.device)} if cuda else {}
    return {"flops": counter.get_total_flops()} | peak


def take_turns(names: Sequence[str], sd: StableDiffusion, settings: Settings) -> dict[str, list[float]]:
    """Seconds of each case, one for each time that it is named."""
    seconds: dict[str, list[float]] = {}
    for name in names:
        with CASES[name](sd, settings) as run:
            seconds.setdefault(name, []).append(timed(run, sd.device))
    return seconds


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done everything that a run tells it to do."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda device: None
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def quartiles(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("q1", "median", "q3"), np.quantile(values, [0.25, 0.5, 0.75]).tolist(), strict=True))


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors on the meta device that are alive, and their peak, beside those of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._model = [*model.parameters(), *model.buffers()]  # keeps the storages' objects alive
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in self._model)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outcome = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, outcome)
        return outcome

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage not in self._known:
            self._known.add(storage)
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def estimate(sd: StableDiffusion, settings: Settings, names: Sequence[str]) -> dict[str, dict]:
    """Operations and memory of cases by the shapes of the tensors of a model on the meta device, and ratios."""
    sd.to("meta")  # buffers too
    weights, cases = sum(tensor.nbytes for tensor in (*sd.parameters(), *sd.buffers())), {}
    for name in tqdm([name for name in names if name not in WITH_VALUES], "shapes"):
        with (
            shapes.patch(meta_nonzero_assume_all_nonzero=True),  # all images have concepts
            CASES[name](sd, settings) as run,
            patch.object(F, "scaled_dot_product_attention", fused_attention),
            FlopCounterMode(display=False) as counter,
            LiveBytes(sd) as live,
        ):
            run()
        cases[name] = {"flops": counter.get_total_flops(), "peak_bytes": weights + live.peak, "weights_bytes": weights}
        if name == "train_step_checkpointing":  # what is recomputed under a dispatch mode is freed too late
            del cases[name]["peak_bytes"]
    flops = {name: case["flops"] for name, case in cases.items()}
    ratios = {name: {"flops": flops[a] / flops[b]} for name, (a, b) in RATIOS.items() if {a, b} <= {*cases}}
    return {"cases": cases, "ratios": ratios}


def fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Holds no map of the attention, as on CUDA and CPU; torch takes attention apart on the meta device."""
    if attn_mask is None and q.shape[-1] == v.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)[0]
    return UNFUSED(q, k, v, attn_mask, **options)


def table(found: dict[str, dict]) -> str:
    """What `measure` or `estimate` gives: a row for each case, then for each ratio."""
    cases = pd.DataFrame(found["cases"]).T
    cases = cases.assign(**{name: cases[name] / 1e9 for name in cases if name.endswith(("flops", "bytes"))})
    cases = cases.rename(columns=lambda name: name.replace("flops", "GFLOP").replace("bytes", "GB"))
    frames = (cases, pd.DataFrame(found["ratios"]).T)
    return "\n\n".join(frame.to_string(float_format="{:.4g}".format) for frame in frames if len(frame))
