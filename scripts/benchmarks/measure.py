"""Times, operations and memory of cases, gathered as JSON holds them (docs/performance.md) and shown as text.

Cases of a group take turns, round by round: A B C A B C … So a machine that is busy for a while is so for all of them.
A ratio is that of the medians; its quartiles are those of the ratios within each round.
"""

import gc
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from infusion.concepts.concept import now
from ldm.pipeline import StableDiffusion, half_precision
from ldm.util.cli import UserError
from scripts.benchmarks.cases import CASES, DTYPES, NOUNS, SCALE, STEPS, build_model
from scripts.benchmarks.settings import GROUPS, MEMORY, RATIOS, TIMED, Settings

PEAK_SIDE, PEAK_REPEATS = {"cpu": 2048, "cuda": 8192}, 5  # of the matrices that the peak is measured by
PROCESS = Path("/proc/self")
HOW = {
    "cuda": "torch.cuda.max_memory_allocated; loaded: memory_allocated after the model was built",
    "cpu": "peak resident set of a fresh process (VmHWM); loaded: resident set after the model was built",
}


def benchmark(settings: Settings, chosen: Sequence[str], command: str = "", progress: bool = False) -> dict:
    """Everything that was measured, as JSON holds it.

    Args:
        chosen: names, as of `scripts.benchmarks.settings.choose`. command: what the user typed, to be kept.

    Raises:
        RuntimeError: this UNet and diffusers' differ by more than rounding.
    """
    timed, device = [name for name in chosen if name in TIMED], torch.device(settings.device)
    with tqdm(total=len(chosen) + settings.repeats * len(timed), disable=not progress) as bar:

        def advance(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        peaks, seconds, flops, agreement = {}, {}, {}, {}
        for name in chosen:
            if name in MEMORY:  # before there is a model in this process
                peaks[name] = peak_memory(name, settings)
                advance(name)
        fastest = peak_flops(settings) if timed else None
        sd = build_model(settings) if timed else None
        for group in GROUPS:
            names = [name for name in group if name in timed]
            if {"unet", "unet_diffusers"} <= set(names):
                agreement["unet_vs_diffusers"] = check_agreement(sd, settings)
            for name in names:
                flops[name] = warm_up(name, sd, settings)
                advance(name)
            seconds |= take_turns(names, sd, settings, advance)
            gc.collect()
    times = {name: summarise(values) for name, values in seconds.items()}
    return {
        "date": now(),
        "command": command,
        "device": describe_device(settings),
        "settings": asdict(settings) | {"cases": list(chosen), "scale": SCALE, "concepts": list(NOUNS)},
        "peak": fastest,
        "times": times,
        "flops": flops,
        "utilisation": {name: flops[name] / times[name]["median_s"] / fastest["flops_per_s"] for name in times},
        "ratios": {
            name: ratio(seconds[a], seconds[b]) | {"flops": flops[a] / flops[b]}
            for name, (a, b) in RATIOS.items()
            if a in seconds and b in seconds
        },
        "agreement": agreement,
        "memory": {"how": HOW[device.type], "peaks": peaks},
    }


# --- time -------------------------------------------------------------------------------------------------------------


def take_turns(
    names: Sequence[str],
    sd: StableDiffusion | None,
    settings: Settings,
    advance: Callable[[str], None] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each case, `settings.repeats` rounds; what has to be warmed up is warm already."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(settings.repeats):
        for name in names:
            with CASES[name](sd, settings) as run:
                synchronise(settings)
                start = clock()
                run(STEPS.get(name, 1))
                synchronise(settings)
                seconds[name].append(clock() - start)
            advance(name)
    return seconds


def warm_up(name: str, sd: StableDiffusion, settings: Settings) -> int:
    """Floating-point operations of a case, a multiplication and addition being two; compiles it if need be.

    They are counted by formula from the shapes of matrix products, convolutions and attention
    (`torch.utils.flop_counter`); everything else counts nothing. What is recomputed counts again. Every step of a case
    does the same, so that n of them take F(n) = F(1) + (n − 1) (F(2) − F(1)).
    """
    counts, steps = [], STEPS.get(name, 1)
    for number in (1, 2)[:steps]:
        eager = torch.compiler.set_stance("force_eager")  # the counter does not see into compiled code
        with CASES[name](sd, settings) as run, eager, FlopCounterMode(display=False) as counter:
            run(number)
        counts.append(counter.get_total_flops())
    if settings.compile:
        with CASES[name](sd, settings) as run:
            run(min(steps, 2))
    return counts[0] + (steps - 1) * (counts[-1] - counts[0])


def peak_flops(settings: Settings) -> dict[str, float | str]:
    """The most operations a second that the device is seen to do, in the type that is computed in, and `how`."""
    dtype, side = compute_dtype(settings), PEAK_SIDE[torch.device(settings.device).type]
    a, b = torch.randn(2, side, side, device=settings.device).to(dtype)
    seconds = []
    for _ in range(1 + PEAK_REPEATS):
        synchronise(settings)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronise(settings)
        seconds.append(time.perf_counter() - start)
    name = str(dtype).removeprefix("torch.")
    how = f"fastest of {PEAK_REPEATS} products of two {side} × {side} matrices in {name}"
    return {"flops_per_s": 2 * side**3 / min(seconds[1:]), "how": how}


def synchronise(settings: Settings) -> None:
    """Waits until the device has done everything it was told to."""
    if torch.device(settings.device).type == "cuda":
        torch.cuda.synchronize(settings.device)


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, minimum and number of measurements."""
    q1, median, q3 = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return {"median_s": median, "q1_s": q1, "q3_s": q3, "min_s": min(seconds), "n": len(seconds)}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Ratio of the medians, and the quartiles of the ratios within each round."""
    q1, q3 = np.quantile(np.divide(numerator, denominator), [0.25, 0.75]).tolist()
    return {"value": float(np.median(numerator) / np.median(denominator)), "q1": q1, "q3": q3, "n": len(numerator)}


def check_agreement(sd: StableDiffusion, settings: Settings) -> float:
    """‖a − b‖ / ‖b‖ of the predictions of this UNet and diffusers'.

    Raises:
        RuntimeError: it is more than rounding explains, which is 2e-4 in float32, 5e-3 in float32 on CUDA, whose
            convolutions may use TF32, and 5e-2 in half precision.
    """
    found = []
    for name in ("unet", "unet_diffusers"):
        with CASES[name](sd, settings) as run, torch.compiler.set_stance("force_eager"):
            found.append(run(1).double())
    difference = ((found[0] - found[1]).norm() / found[1].norm()).item()
    tolerance = 5e-3 if sd.device.type == "cuda" else 2e-4
    if not difference <= (tolerance if settings.precision == "full" else 5e-2):
        raise RuntimeError(f"unet and unet_diffusers differ by {difference:.1e} of their norm: times say nothing")
    return difference


# --- memory -----------------------------------------------------------------------------------------------------------


def measurable(chosen: Sequence[str], named: bool, device: torch.device) -> list[str]:
    """The cases without those of memory where it cannot be measured; UserError if they were asked for by name."""
    if device.type == "cuda" or os.access(PROCESS / "clear_refs", os.W_OK):
        return list(chosen)
    if named and (asked := [name for name in chosen if name in MEMORY]):
        raise UserError(f"--only: {asked[0]} is measured on CUDA and on Linux only: leave it out")
    return [name for name in chosen if name not in MEMORY]


def peak_memory(name: str, settings: Settings) -> dict[str, int]:
    """Bytes at the peak of a case, with the model built, and the former above the latter; nothing is compiled."""
    if torch.device(settings.device).type == "cuda":
        return peak_here(name, settings)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(peak_here, name, settings).result()


def peak_here(name: str, settings: Settings) -> dict[str, int]:
    """As `peak_memory`, in this process, which should hold little else."""
    settings = replace(settings, compile=False)
    sd = build_model(settings)
    gc.collect()
    if sd.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(sd.device)
        loaded = torch.cuda.memory_allocated(sd.device)
    else:
        (PROCESS / "clear_refs").write_text("5")  # begins a new peak
        loaded = status("VmRSS")
    with CASES[name](sd, settings) as run:
        run(2)  # the optimiser has its state from the second step on
    highest = torch.cuda.max_memory_allocated(sd.device) if sd.device.type == "cuda" else status("VmHWM")
    highest = max(highest, loaded)  # the system counts the two some pages apart
    return {"peak_bytes": highest, "loaded_bytes": loaded, "above_loaded_bytes": highest - loaded}


def status(key: str) -> int:
    """A line of this process's status, in bytes."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


# --- what is told -----------------------------------------------------------------------------------------------------


def compute_dtype(settings: Settings) -> torch.dtype:
    """What matrix products are computed in."""
    autocast = settings.precision == "autocast"
    return half_precision(torch.device(settings.device)) if autocast else DTYPES[settings.precision]


def describe_device(settings: Settings) -> dict[str, object]:
    """The device's name, its cores and threads, torch and the type that is computed in."""
    cuda, file = torch.device(settings.device).type == "cuda", Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "type": torch.device(settings.device).type,
        "name": torch.cuda.get_device_name(settings.device) if cuda else (names or [platform.machine()])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(compute_dtype(settings)).removeprefix("torch."),
        "tf32": torch.backends.cuda.matmul.allow_tf32 if cuda else None,
    }


def table(result: dict) -> str:
    """Cases, ratios and memory of what `benchmark` gives, in lines."""
    device, settings = result["device"], result["settings"]
    parts = [f"{device['name']}, {device['threads']} threads, torch {device['torch']}, {settings}"]
    if result["times"]:
        times = pd.DataFrame(result["times"]).T
        times["GFLOP"] = pd.Series(result["flops"]) / 1e9
        times["utilisation"] = pd.Series(result["utilisation"])
        parts += [times.to_string(float_format="{:.3g}".format), result["peak"]["how"]]
    if result["ratios"]:
        parts.append(pd.DataFrame(result["ratios"]).T.to_string(float_format="{:.3f}".format))
    if result["memory"]["peaks"]:
        mebibytes = pd.DataFrame(result["memory"]["peaks"]).T / 2**20
        mebibytes.columns = [name.replace("_bytes", " MiB") for name in mebibytes.columns]
        parts += [mebibytes.to_string(float_format="{:,.1f}".format), result["memory"]["how"]]
    return "\n\n".join(parts)
