"""Measures the cases that are asked for, and gathers times, operations, utilisation, ratios and memory."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch._dynamo.utils import counters
from tqdm import tqdm

from infusion.concepts.concept import now
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError
from scripts.benchmarks.cases import SCALE, guided_steps, images, optimiser_steps, train_steps
from scripts.benchmarks.inputs import NOUNS
from scripts.benchmarks.means import sampling_means, training_means
from scripts.benchmarks.memory import HOW, peak
from scripts.benchmarks.model import build_model, compute_dtype, describe_device
from scripts.benchmarks.peer import check_agreement, unet_calls
from scripts.benchmarks.settings import (
    GUIDED,
    IMAGE,
    MEANS,
    MEMORY,
    OPTIMISER,
    PEERS,
    RATIOS,
    RATIOS_OF_MEANS,
    SAMPLING_MEANS,
    TIMED,
    TRAIN,
    TRAINING_MEANS,
    Settings,
)
from scripts.benchmarks.timing import Case, count_flops, interleave, peak_flops, ratio, summarise, synchroniser, warm_up

GROUPS: dict[tuple[str, ...], Callable[[StableDiffusion, Settings], list[Case]]] = {  # cases measured in turn
    GUIDED: guided_steps,
    PEERS: unet_calls,
    TRAIN: train_steps,
    (IMAGE,): images,
    (OPTIMISER,): optimiser_steps,
    SAMPLING_MEANS: sampling_means,
    TRAINING_MEANS: training_means,
}
DYNAMO = {
    "recompile_limit": 64,  # of one function; beyond it code would run uncompiled without a word
    "fail_on_recompile_limit_hit": True,
    "skip_fwd_side_effects_in_bwd_under_checkpoint": True,  # an edited layer's tape is not read while recomputing
}


def check_compiler(device: torch.device) -> None:
    """UserError where `torch.compile` does not work: without a C++ compiler, or on CUDA without Triton."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--compile: torch.compile does not work here ({reason}); leave it out") from error


def benchmark(settings: Settings, chosen: Sequence[str], command: str = "", progress: bool = False) -> dict:
    """Everything that was measured, as JSON holds it; see docs/performance.md for the keys.

    Args:
        chosen: names, as of `scripts.benchmarks.settings.choose`.
        command: what the user typed, to be kept.
        progress: show a bar.

    Raises:
        RuntimeError: this UNet and diffusers' differ.
    """
    device = torch.device(settings.device)
    timed = [name for name in chosen if name in (*TIMED, *MEANS)]
    total = len(chosen) + settings.repeats * len(timed)
    seconds, flops, compiled, memory, agreement = {}, {}, {}, {}, {}
    with tqdm(total=total, disable=not progress) as bar:

        def advance(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        for name in chosen:
            if name in MEMORY:  # before there is a model in this process
                memory[name] = peak(name, settings)
                advance(name)
        fastest = peak_flops(device, compute_dtype(settings)) if timed else None
        sd = build_model(settings) if timed else None
        if timed and settings.compile:
            sd.unet.compile(dynamic=False)
        for names in GROUPS:
            if set(names) & set(timed):
                cases = GROUPS[names](sd, settings)
                if names == PEERS:
                    agreement["unet_vs_diffusers"] = check_agreement(*cases, settings)
                measured = measure([case for case in cases if case.name in timed], settings, advance)
                seconds |= measured[0]
                flops |= measured[1]
                compiled |= measured[2]
                del cases  # and what they hold, such as another UNet
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
        "ratios": ratios(seconds, flops),
        "absolute": absolute(times, settings),
        "agreement": agreement,
        "compile": compiled,
        "memory": {"how": HOW[device.type], "peaks": memory},
    }


def measure(
    cases: Sequence[Case], settings: Settings, advance: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, dict]]:
    """Seconds, operations and, with `settings.compile`, graphs of cases that are compared; by name."""
    flops, compiled = {}, {}
    torch._dynamo.reset()
    with torch._dynamo.config.patch(DYNAMO):
        for case in cases:
            warm_up_eagerly(case)
            flops[case.name] = count_flops(case)
            if settings.compile:
                compiled[case.name] = graphs(case)
            advance(case.name)
        before = counters["stats"]["unique_graphs"]
        seconds = interleave(cases, settings.repeats, synchroniser(torch.device(settings.device)), advance=advance)
        late = counters["stats"]["unique_graphs"] - before
    for entry in compiled.values():
        entry["graphs_compiled_while_timed"] = late
    return seconds, flops, compiled


def warm_up_eagerly(case: Case) -> None:
    """What is computed once and kept, such as text encodings, is there before operations are counted."""
    with torch.compiler.set_stance("force_eager"):
        warm_up(case)


def graphs(case: Case) -> dict[str, object]:
    """Compiles a case: number of graphs, of graph breaks, and the reasons of the breaks with how often each occurs."""
    counters.clear()
    warm_up(case)
    breaks = {reason.splitlines()[0]: number for reason, number in counters["graph_break"].items()}
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(breaks.values()),
        "reasons": breaks,
    }


def ratios(seconds: dict[str, list[float]], flops: dict[str, int]) -> dict[str, dict]:
    """The ratios of which both sides were measured; `flops` is the ratio of operations."""
    return {
        name: ratio(seconds[a], seconds[b]) | {"flops": flops[a] / flops[b]}
        for name, (a, b) in (RATIOS | RATIOS_OF_MEANS).items()
        if a in seconds and b in seconds
    }


def absolute(times: dict[str, dict], settings: Settings) -> dict[str, float]:
    """Median seconds of an image of a batch, and of so many optimiser steps in a row."""
    shares = {IMAGE: settings.batch, OPTIMISER: 1}
    return {f"{name}_s": times[name]["median_s"] / share for name, share in shares.items() if name in times}
