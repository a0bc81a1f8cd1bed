"""All that waits for a GPU, of SD 1.5 and SDXL; rehearsed on small models, also on a CPU."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from torch.amp import GradScaler

from ldm.pipeline import StableDiffusion
from ldm.util.config import BACKBONES, load_config
from scripts.benchmarks import cases
from scripts.benchmarks.cases import Settings
from scripts.benchmarks.measure import measure, timed

SIZES = {"sd15": "infusion_custom.yaml", "sdxl": "infusion_sdxl.yaml"}  # size -> the recipe of a concept
SMALL = {"pocket": "infusion_custom.yaml", "pocket_xl": "infusion_sdxl.yaml"}
MINUTES = 8  # in all
PHOTOS = 4  # of a training step, as in the recipes
Part = Callable[[StableDiffusion, Settings], object]


def battery(device: torch.device, rehearse: bool, save: Callable[[dict], None]) -> dict[str, dict]:
    """Size -> what is to be known of a concept on a GPU, as JSON holds it; saved after each part.

    A part that fails says why, unless this is a rehearsal; one that might not end in time is left out.
    """
    end, sizes = time.monotonic() + 60 * MINUTES, {}
    for size, recipe in (SMALL if rehearse else SIZES).items():
        settings = Settings(str(device), size, cases.side_of_latents(size), precision="bf16", repeats=3)
        if rehearse:
            settings = replace(settings, latent=8, steps=2, repeats=1)
        sd, found = cases.build_model(settings), {"settings": asdict(settings)}
        sizes[size] = found
        for name, (seconds, part) in PARTS.items():
            if time.monotonic() + seconds > end and not rehearse:
                found[name] = "left out: no time"
                continue
            try:
                found[name] = part(sd, settings)
            except RuntimeError as error:  # no memory, nothing to capture: the other parts still have their turn
                if rehearse:
                    raise
                found[name] = f"failed: {str(error).splitlines()[0]}"
            save(sizes)
        found |= sums(found, load_config(BACKBONES.parent / recipe))
        save(sizes)
        del sd
    return sizes


def measured(*names: str, batch: int = 1) -> Part:
    """A part that gives cases and their ratios by name, see `measure`."""

    def part(sd: StableDiffusion, settings: Settings) -> dict[str, dict]:
        found = measure(sd, replace(settings, batch=batch), names)
        return found["cases"] | found["ratios"]

    return part


def matrix_speed(sd: StableDiffusion, settings: Settings) -> float:
    """Operations a second of a large product of matrices in the UNet's dtype."""
    side = 8192 if sd.device.type == "cuda" else 256
    matrix = torch.randn(side, side, device=sd.device, dtype=sd.dtype)
    return 2 * side**3 / median(lambda: matrix @ matrix, settings)


def fp16_scaler(sd: StableDiffusion, settings: Settings) -> dict[str, float | bool]:
    """Ten optimiser steps with weights in float16 and a scaled loss, which is skipped and halved where it overflows."""
    scaler = GradScaler(sd.device.type)
    sd.cast(torch.float16)
    try:
        with cases.train_step(sd, settings, scaler=scaler) as run:
            losses = [run().item() for _ in range(10)]
    finally:
        sd.cast(cases.DTYPES[settings.precision])
    finite = bool(np.isfinite(losses).all())
    return {"finite": finite, "first": losses[0], "last": losses[-1], "scale": scaler.get_scale()}


def cuda_graph(sd: StableDiffusion, settings: Settings) -> dict[str, float] | str:
    """Seconds of a guided step with a concept, launched one kernel after the other and as a graph."""
    if sd.device.type != "cuda":
        return "needs CUDA"
    with cases.guided_step(sd, settings, concepts=1) as run:
        launched, graph = median(run, settings), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            run()
        replayed = median(graph.replay, settings)
    return {"launched": launched, "replayed": replayed, "ratio": replayed / launched}


def compiled(sd: StableDiffusion, settings: Settings) -> dict[str, float]:
    """Seconds of one call of the UNet, plain and compiled, and of compiling it (eagerly on a CPU: a rehearsal)."""
    with cases.unet(sd, settings) as run:
        plain = median(run, settings)
        sd.unet.compile(backend="inductor" if sd.device.type == "cuda" else "eager")
        try:
            compiling, then = timed(run, sd.device), median(run, settings)
        finally:
            sd.unet._compiled_call_impl = None
    return {"plain": plain, "compiled": then, "ratio": then / plain, "compiling": compiling}


def median(run: Callable[[], object], settings: Settings) -> float:
    """Seconds of a run, after one that is not counted."""
    return float(np.median([timed(run, torch.device(settings.device)) for _ in range(settings.repeats + 1)][1:]))


PARTS: dict[str, tuple[int, Part]] = {  # name -> seconds that it may take, function
    "matrix_flops_per_s": (5, matrix_speed),
    "guided_step": (15, measured("guided_step_base", "guided_step_one_concept")),
    "unet": (10, measured("unet")),
    "train_step": (20, measured("train_step", batch=PHOTOS)),
    "train_step_checkpointing": (20, measured("train_step_checkpointing", batch=PHOTOS)),
    "image": (40, measured("image")),
    "fp16_scaler": (20, fp16_scaler),
    "cuda_graph": (20, cuda_graph),
    "compiled": (120, compiled),
}


def sums(found: dict, recipe: DictConfig) -> dict[str, object]:
    """What follows: seconds of a concept by its recipe, and each case's share of the speed of a product of matrices."""
    derived: dict[str, object] = {}
    recomputes = OmegaConf.select(recipe, "sd.params.unet.params.checkpoint", default=False)
    step = "train_step_checkpointing" if recomputes else "train_step"
    if isinstance(found[step], dict):
        photos = recipe.trainer.max_steps * recipe.trainer.accumulate_grad_batches * recipe.batch_size
        derived = {"concept_photos": photos, "concept_s": photos * found[step][step]["median"] / PHOTOS}
    if isinstance(best := found["matrix_flops_per_s"], float):
        each = {name: one for part in found.values() if isinstance(part, dict) for name, one in part.items()}
        shares = {name: one["flops"] / one["median"] / best for name, one in each.items() if name in cases.CASES}
        derived["utilisation"] = shares
    return derived


def table(sizes: dict[str, dict]) -> str:
    """A row for each thing measured, a column for each size."""
    columns = {size: pd.json_normalize(found).iloc[0] for size, found in sizes.items()}
    return pd.DataFrame(columns).to_string(float_format="{:.4g}".format)
