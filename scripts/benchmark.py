"""Measures what a concept costs on this machine: time, operations and memory, beside the base model and diffusers.

python scripts/benchmark.py --latent 32 --json outputs/benchmark.json    # SD 1.5 on a CPU
python scripts/benchmark.py --size pocket --memory                       # two minutes on a laptop
python scripts/benchmark.py --size sdxl --estimate                       # from shapes alone: needs no memory
python scripts/benchmark.py --battery --json results/benchmark/gpu.json  # all that waits for a GPU, in 8 minutes

All weights are random. Cases take turns (A B C A B C …), so that any other load on the machine slows all of them.
"""

import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.fx.experimental import _config as shapes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data.prompts import TEMPLATES
from infusion.concepts.concept import Concept, now
from infusion.gate import Gate
from infusion.inject import cross_attention_layers, edited, remove
from infusion.methods.infusion import Infusion
from infusion.sampling.customised import Customised
from infusion.sampling.settings import Settings as Sampling
from infusion.training.trainer import ConceptTrainer
from ldm.pipeline import StableDiffusion
from ldm.util.cli import Parser, UserError, batch, count, find_device, report, suggestion, words, written
from ldm.util.config import BACKBONES, load_config
from ldm.util.files import write
from ldm.weights.export import diffusers_tensors, unet_config

DTYPES = {"full": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of weights
NOUNS = ("cat", "dog", "hat", "car", "fish", "tree", "bird", "boat")
SCALE, TIMESTEP, STD = 7.5, 500, 0.02  # guidance; of single calls; of weights that a fresh model has as zeros
GATE = Gate(kind="hard")  # it reads no encodings, which have no values on the meta device
PROCESS = Path("/proc/self")
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Settings:
    """What everything is measured with: `latent` is the side of the latents, `steps` those of the image."""

    device: str
    size: str
    latent: int
    batch: int = 1
    precision: str = "full"
    steps: int = 50
    repeats: int = 5


def build_model(settings: Settings) -> StableDiffusion:
    """A frozen model with random weights, the same on every call.

    A fresh UNet is zero where its residual branches end, so that it would predict zero and agree with anything.
    """
    torch.manual_seed(0)
    with torch.device(settings.device):
        sd = StableDiffusion.from_config(BACKBONES / f"{settings.size}.yaml")
    for parameter in sd.parameters():
        if not parameter.is_meta and not parameter.any():
            nn.init.normal_(parameter, std=STD)
    sd.cast(DTYPES[settings.precision])
    return sd.requires_grad_(False)


# --- cases: each makes ready, which is not timed, and gives what is ---------------------------------------------------


@contextmanager
def guided_step(sd: StableDiffusion, settings: Settings, concepts: int) -> Iterator[Run]:
    """One step of classifier-free guidance; gives the prediction (B, C, h, w)."""
    slots = [f"{{{i + 1}}}" for i in range(concepts)] or [NOUNS[0]]
    prompts = [f"a photo of a {', a '.join(slots)}"] * settings.batch
    latents, timestep = noise(sd, settings), torch.tensor(TIMESTEP, device=sd.device)
    with ExitStack() as stack, torch.no_grad(), autocast(sd, settings):
        if concepts:
            customised = Customised(sd, random_concepts(sd, concepts), Sampling(scale=SCALE))
            denoise = stack.enter_context(customised)(prompts)
        else:
            denoise = sd.guided(prompts, scale=SCALE)
        yield lambda: denoise(latents, timestep)


@contextmanager
def image(sd: StableDiffusion, settings: Settings) -> Iterator[Run]:
    """Guided images with a concept, from noise to pixels; gives (B, 3, H, W) in [0, 1]."""
    side, seeds = settings.latent * sd.vae.factor, range(settings.batch)
    with Customised(sd, random_concepts(sd, 1), Sampling(scale=SCALE)) as customised, autocast(sd, settings):
        denoise = customised(["a photo of a {}"] * settings.batch)
        yield lambda: sd.decode(sd.draw_latents(denoise, seeds, settings.steps, height=side, width=side))


@contextmanager
def unet(sd: StableDiffusion, settings: Settings, diffusers: bool = False) -> Iterator[Run]:
    """One call of the UNet without guidance, or of diffusers' with the same weights; gives (B, C, h, w)."""
    latents = noise(sd, settings).to(sd.dtype)
    timesteps = torch.full((settings.batch,), TIMESTEP, device=sd.device)
    if diffusers:
        with torch.device("meta"):  # holds no second copy while the weights are on their way
            peer = UNet2DConditionModel.from_config(unet_config(sd.unet, settings.latent))
        peer.load_state_dict(diffusers_tensors(sd.unet, sd.dtype), assign=True)
        peer = peer.eval().to(sd.device)
    with torch.no_grad(), autocast(sd, settings):
        context = sd.text.context(sd.text.tokenizer(["a photo of a cat"] * settings.batch)).to(sd.device, sd.dtype)
        side = settings.latent * sd.vae.factor
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * settings.batch, device=sd.device)
        added = None if context.pooled is None else {"text_embeds": context.pooled, "time_ids": sizes.float()}
        if diffusers:
            yield lambda: peer(latents, timesteps, context.text, added_cond_kwargs=added, return_dict=False)[0]
        else:
            yield lambda: sd.unet(latents, timesteps, context)


@contextmanager
def train_step(
    sd: StableDiffusion, settings: Settings, checkpointing: bool = False, scaler: GradScaler | None = None
) -> Iterator[Run]:
    """An optimiser step of Infusion on cached latents and cached text; gives the loss before it."""
    trainer = ConceptTrainer(sd, Infusion(), NOUNS[0], TEMPLATES, GATE).to(sd.device)
    scaler = GradScaler(sd.device.type, enabled=False) if scaler is None else scaler
    remove(sd.unet)  # the trainer's edits, which are put back below
    optimiser, latents = trainer.configure_optimizers(), noise(sd, settings)
    templates = [TEMPLATES[i % len(TEMPLATES)] for i in range(settings.batch)]
    rows = {"latents": latents, "mask": latents[:, :1].sigmoid(), "template": templates}
    trainer.encode(TEMPLATES)

    def run() -> Tensor:
        with autocast(sd, settings):
            loss = trainer.denoising_loss(rows, torch.Generator().manual_seed(0), {})
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        return loss.detach()

    before, sd.unet.checkpoint = sd.unet.checkpoint, checkpointing
    try:
        with edited(sd.unet, trainer.edits):
            yield run
    finally:
        sd.unet.checkpoint = before


CASES: dict[str, Callable[[StableDiffusion, Settings], AbstractContextManager[Run]]] = {
    "guided_step_base": partial(guided_step, concepts=0),
    "guided_step_one_concept": partial(guided_step, concepts=1),
    "guided_step_eight_concepts": partial(guided_step, concepts=len(NOUNS)),
    "unet": unet,
    "unet_diffusers": partial(unet, diffusers=True),
    "train_step": train_step,
    "train_step_checkpointing": partial(train_step, checkpointing=True),
    "image": image,
}
RATIOS = {  # name -> the case whose time is divided, and the one that it is divided by
    "guided_step_with_concept_vs_base": ("guided_step_one_concept", "guided_step_base"),
    "guided_step_with_8_concepts_vs_one": ("guided_step_eight_concepts", "guided_step_one_concept"),
    "unet_vs_diffusers": ("unet", "unet_diffusers"),
    "train_step_with_checkpointing_vs_without": ("train_step_checkpointing", "train_step"),
}


def noise(sd: StableDiffusion, settings: Settings) -> Tensor:
    """Standard normal latents (B, C, h, w), float32, the same on every call."""
    shape = (settings.batch, sd.vae.embed_dim, settings.latent, settings.latent)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(sd.device)


def random_concepts(sd: StableDiffusion, number: int) -> list[Concept]:
    """Infusion's concepts with random residuals, each of another superclass."""
    generator = torch.Generator().manual_seed(0)
    widths = {name: layer.heads * layer.dim_head for name, layer in cross_attention_layers(sd.unet).items()}
    concepts = []
    for noun in NOUNS[:number]:
        residuals = {name: 0.1 * torch.randn(width, generator=generator) for name, width in widths.items()}
        concepts.append(Concept(residuals, noun, ("a photo of a {}",), sd.architecture, sd.hash, gate=GATE))
    return concepts


def autocast(sd: StableDiffusion, settings: Settings) -> AbstractContextManager:
    return sd.autocast("autocast") if settings.precision == "autocast" else nullcontext()


# --- measuring --------------------------------------------------------------------------------------------------------


def benchmark(settings: Settings, names: Sequence[str], memory: bool = False) -> dict:
    """Times, operations, ratios and memory of cases, as JSON holds them (docs/performance.md).

    Raises:
        RuntimeError: this UNet and diffusers' differ by more than rounding.
    """
    peaks = {name: peak_memory(name, settings) for name in tqdm(names, "memory")} if memory else {}
    sd = build_model(settings)
    agreement = {"unet_vs_diffusers": check_agreement(sd, settings)} if {"unet", "unet_diffusers"} <= {*names} else {}
    flops = {name: count_flops(name, sd, settings) for name in tqdm(names, "warming up")}
    seconds = take_turns(tqdm(list(names) * settings.repeats, "rounds"), sd, settings)
    times, ratios = {}, {}
    for name, values in seconds.items():
        q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        times[name] = {"median_s": median, "q1_s": q1, "q3_s": q3, "min_s": min(values), "n": len(values)}
    for name, (a, b) in RATIOS.items():
        if {a, b} <= {*names}:
            q1, q3 = np.quantile(np.divide(seconds[a], seconds[b]), [0.25, 0.75]).tolist()  # within each round
            value = times[a]["median_s"] / times[b]["median_s"]
            ratios[name] = {"value": value, "q1": q1, "q3": q3, "flops": flops[a] / flops[b]}
    return {
        "date": now(),
        "device": describe(sd.device),
        "settings": asdict(settings),
        "times": times,
        "flops": flops,
        "ratios": ratios,
        "agreement": agreement,
        "memory": peaks,
    }


def take_turns(
    names: Sequence[str],
    sd: StableDiffusion,
    settings: Settings,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each case, one for each time that it is named."""
    seconds: dict[str, list[float]] = {}
    for name in names:
        with CASES[name](sd, settings) as run:
            synchronise(settings)
            start = clock()
            run()
            synchronise(settings)
            seconds.setdefault(name, []).append(clock() - start)
    return seconds


def synchronise(settings: Settings) -> None:
    """Waits until the device has done everything that it was told to do."""
    if torch.device(settings.device).type != "cpu":
        torch.accelerator.synchronize(settings.device)


def count_flops(name: str, sd: StableDiffusion, settings: Settings) -> int:
    """Operations of matrix products, convolutions and attention; a multiplication and an addition are two."""
    with CASES[name](sd, settings) as run, FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def check_agreement(sd: StableDiffusion, settings: Settings) -> float:
    """‖a − b‖ / ‖b‖ of the predictions of this UNet and diffusers'.

    Raises:
        RuntimeError: more than rounding explains: 2e-4 in float32, 5e-3 on CUDA (TF32), 5e-2 in half precision.
    """
    with unet(sd, settings) as ours, unet(sd, settings, diffusers=True) as theirs:
        a, b = ours().double(), theirs().double()
    difference = ((a - b).norm() / b.norm()).item()
    tolerance = 5e-2 if settings.precision != "full" else 5e-3 if sd.device.type == "cuda" else 2e-4
    if not difference <= tolerance:
        raise RuntimeError(f"unet and unet_diffusers differ by {difference:.1e} of their norm: times say nothing")
    return difference


def peak_memory(name: str, settings: Settings) -> dict[str, int]:
    """Bytes of a case in a process of its own: at the peak, with the model built, and the former above the latter."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(peak_here, name, settings).result()


def peak_here(name: str, settings: Settings) -> dict[str, int]:
    sd = build_model(settings)
    if cuda := sd.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(sd.device)
    else:
        (PROCESS / "clear_refs").write_text("5")  # begins a new peak
    loaded = torch.cuda.memory_allocated(sd.device) if cuda else resident("VmRSS")
    with CASES[name](sd, settings) as run:
        run()
        run()  # the optimiser has its state from the second step on
    peak = torch.cuda.max_memory_allocated(sd.device) if cuda else resident("VmHWM")
    peak = max(peak, loaded)  # the system counts the two some pages apart
    return {"peak_bytes": peak, "loaded_bytes": loaded, "above_loaded_bytes": peak - loaded}


def resident(key: str) -> int:
    """Resident memory of this process in bytes: "VmRSS" now, "VmHWM" at its peak."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def describe(device: torch.device) -> dict[str, object]:
    """Name of the device, cores and threads of the machine, and the version of torch."""
    name, file = platform.machine(), Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif file.is_file() and (found := re.search(r"model name\s*: (.*)", file.read_text())):
        name = found[1]
    threads = torch.get_num_threads()
    return {"type": device.type, "name": name, "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}


# --- from shapes alone ------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors on the meta device that are alive, and their peak, beside those of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        held = [*model.parameters(), *model.buffers()]
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in held)
        self._model = held  # keeps the storages' objects alive

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outcome = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, outcome)
        return outcome

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage not in self.known:
            self.known.add(storage)
            self._add(storage.nbytes())
            weakref.finalize(storage, self._add, -storage.nbytes())

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Holds no map of the attention, as on CUDA and CPU; torch takes attention apart on the meta device."""
    if attn_mask is None and q.shape[-1] == v.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)[0]
    return UNFUSED(q, k, v, attn_mask, **options)


UNFUSED, WITH_VALUES = F.scaled_dot_product_attention, ("image", "unet_diffusers")  # cases that the meta device has not


def estimate(settings: Settings, names: Sequence[str]) -> dict:
    """Operations and memory of cases, as JSON holds them, by the shapes of their tensors; nothing is computed."""
    sd = build_model(settings).to("meta")  # buffers too
    loaded = sum(tensor.nbytes for tensor in [*sd.parameters(), *sd.buffers()])
    flops, memory = {}, {}
    for name in tqdm([name for name in names if name not in WITH_VALUES], "shapes"):
        with (
            shapes.patch(meta_nonzero_assume_all_nonzero=True),  # all images have concepts
            CASES[name](sd, settings) as run,
            patch.object(F, "scaled_dot_product_attention", fused_attention),
            FlopCounterMode(display=False) as counter,
            LiveBytes(sd) as live,
        ):
            run()
        flops[name] = counter.get_total_flops()
        if name != "train_step_checkpointing":  # what is recomputed under a dispatch mode is freed too late
            memory[name] = {"peak_bytes": loaded + live.peak, "loaded_bytes": loaded, "above_loaded_bytes": live.peak}
    ratios = {name: {"flops": flops[a] / flops[b]} for name, (a, b) in RATIOS.items() if {a, b} <= {*flops}}
    return {
        "date": now(),
        "device": "meta",
        "settings": asdict(settings),
        "times": {},
        "flops": flops,
        "ratios": ratios,
        "memory": memory,
    }


def table(result: dict) -> str:
    """Cases and ratios of what `benchmark` gives, in lines."""
    rows = pd.DataFrame(result["times"]).T
    rows = rows.reindex(list(result["flops"])).join(pd.Series(result["flops"], name="GFLOP") / 1e9)
    if result["memory"]:
        rows = rows.join(
            pd.DataFrame(result["memory"]).T.rename(columns=lambda name: name.replace("bytes", "MiB")) / 2**20
        )
    parts = [f"{result['device']}\n{result['settings']}", rows.to_string(float_format="{:.4g}".format)]
    if result["ratios"]:
        parts.append(pd.DataFrame(result["ratios"]).T.to_string(float_format="{:.3f}".format))
    return "\n\n".join(parts)


# --- all that waits for a GPU -----------------------------------------------------------------------------------------


BATTERY = {"sd15": "infusion_custom.yaml", "sdxl": "infusion_sdxl.yaml"}  # size -> the recipe of a concept
REHEARSAL = {"pocket": "infusion_custom.yaml", "pocket_xl": "infusion_sdxl.yaml"}
TIMED = ("guided_step_base", "guided_step_one_concept", "unet", "train_step", "train_step_checkpointing", "image")
PHOTOS = 4  # of the battery's training steps, as in the recipes; its other cases draw one image


def battery(device: str, minutes: float, rehearse: bool, save: Callable[[dict], None]) -> dict:
    """What is to be known of a concept on a GPU, as JSON holds it; saved after each part.

    A part that fails says why, unless this is a rehearsal; one that might not end in time is left out.
    """
    end, sizes = time.monotonic() + 60 * minutes, {}
    result = {"date": now(), "device": describe(torch.device(device)), "minutes": minutes, "sizes": sizes}
    parts = {"matrix_flops_per_s": (5, matrix_speed), "measured": (60, measured), "fp16_scaler": (20, fp16_scaler)}
    parts |= {"cuda_graph": (20, cuda_graph), "compiled": (120, compiled)}  # seconds that it may take, function
    for size, recipe in (REHEARSAL if rehearse else BATTERY).items():
        with torch.device("meta"):
            model = StableDiffusion.from_config(BACKBONES / f"{size}.yaml")
        latent = 8 if rehearse else model.image_size // model.vae.factor
        steps, repeats = (2, 1) if rehearse else (50, 3)
        settings = Settings(device, size, latent, precision="bf16", steps=steps, repeats=repeats)
        sd, sizes[size] = build_model(settings), {"settings": asdict(settings)}
        for name, (seconds, part) in parts.items():
            if time.monotonic() + seconds > end and not rehearse:
                sizes[size][name] = "left out: no time"
            elif rehearse:
                sizes[size][name] = part(sd, settings)
            else:
                try:
                    sizes[size][name] = part(sd, settings)
                except RuntimeError as error:  # no memory, nothing to capture: the other parts still have their turn
                    sizes[size][name] = f"failed: {str(error).splitlines()[0]}"
            save(result)
        if isinstance(sizes[size]["measured"], dict):
            sizes[size] |= sums(sizes[size], load_config(BACKBONES.parent / recipe))
        save(result)
        del sd
        release(settings)
    return result


def sums(found: dict, recipe: DictConfig) -> dict[str, float]:
    """What follows: seconds of a concept by its recipe, and each case's share of the speed of a product of matrices."""
    seconds, flops, best = found["measured"]["seconds"], found["measured"]["flops"], found["matrix_flops_per_s"]
    derived = {}
    recomputes = OmegaConf.select(recipe, "sd.params.unet.params.checkpoint", default=False)
    if (step := "train_step_checkpointing" if recomputes else "train_step") in seconds:
        photos = recipe.trainer.max_steps * recipe.trainer.accumulate_grad_batches * recipe.batch_size
        derived = {"concept_photos": photos, "concept_s": photos * seconds[step] / PHOTOS}
    if isinstance(best, float):
        derived["utilisation"] = {name: flops[name] / seconds[name] / best for name in seconds}
    return derived


def measured(sd: StableDiffusion, settings: Settings) -> dict:
    """Seconds, operations and, on CUDA, bytes at the peak of the cases that have the memory; ratios of seconds."""
    flops, peaks, seconds, lacking = {}, {}, {}, []
    for name in TIMED:
        own = replace(settings, batch=PHOTOS) if name.startswith("train") else settings
        release(settings)
        try:
            flops[name] = count_flops(name, sd, own)
            seconds[name] = float(np.median(take_turns([name] * settings.repeats, sd, own)[name]))
        except torch.OutOfMemoryError:
            lacking.append(name)
        if sd.device.type == "cuda":
            peaks[name] = torch.cuda.max_memory_allocated(sd.device)
    ratios = {name: seconds[a] / seconds[b] for name, (a, b) in RATIOS.items() if {a, b} <= {*seconds}}
    return {"seconds": seconds, "flops": flops, "peak_bytes": peaks, "ratios": ratios, "out_of_memory": lacking}


def matrix_speed(sd: StableDiffusion, settings: Settings) -> float:
    """Operations a second of a large product of matrices in the UNet's dtype."""
    side = 8192 if sd.device.type == "cuda" else 256
    matrix = torch.ones(side, side, device=sd.device, dtype=sd.dtype)
    return 2 * side**3 / seconds_of(lambda: matrix @ matrix, settings)


def fp16_scaler(sd: StableDiffusion, settings: Settings) -> dict:
    """Ten optimiser steps with weights in float16 and a scaled loss, which is skipped and halved where it overflows."""
    scaler = GradScaler(sd.device.type)
    sd.cast(torch.float16)
    try:
        with train_step(sd, settings, scaler=scaler) as run:
            losses = [run().item() for _ in range(10)]
    finally:
        sd.cast(DTYPES[settings.precision])
    return {
        "finite": bool(np.isfinite(losses).all()),
        "first": losses[0],
        "last": losses[-1],
        "scale": scaler.get_scale(),
    }


def cuda_graph(sd: StableDiffusion, settings: Settings) -> dict | str:
    """Seconds of a guided step with a concept, launched one kernel after the other and as a graph."""
    if sd.device.type != "cuda":
        return "needs CUDA"
    with guided_step(sd, settings, concepts=1) as run:
        launched, graph = seconds_of(run, settings), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            run()
        replayed = seconds_of(graph.replay, settings)
    return {"launched_s": launched, "replayed_s": replayed, "ratio": replayed / launched}


def compiled(sd: StableDiffusion, settings: Settings) -> dict:
    """Seconds of one call of the UNet, plain and compiled, and of compiling it (eagerly on a CPU: a rehearsal)."""
    with unet(sd, settings) as run:
        plain = seconds_of(run, settings)
        sd.unet.compile(backend="inductor" if sd.device.type == "cuda" else "eager")
        try:
            start = time.perf_counter()
            run()
            synchronise(settings)
            first, then = time.perf_counter() - start, seconds_of(run, settings)
        finally:
            sd.unet._compiled_call_impl = None
    return {"plain_s": plain, "compiled_s": then, "ratio": then / plain, "compiling_s": first - then}


def seconds_of(run: Callable[[], object], settings: Settings) -> float:
    """Median of a run's time, after one that is not counted."""
    seconds = []
    for _ in range(settings.repeats + 1):
        synchronise(settings)
        start = time.perf_counter()
        run()
        synchronise(settings)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def release(settings: Settings) -> None:
    """Gives memory of the GPU that nothing uses back, and begins a new peak."""
    if torch.device(settings.device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(settings.device)


def battery_table(result: dict) -> str:
    """A row for each thing measured, a column for each size."""
    columns = {size: pd.json_normalize(found).iloc[0] for size, found in result["sizes"].items()}
    return f"{result['device']}\n\n" + pd.DataFrame(columns).to_string(float_format="{:.4g}".format)


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        description="Measures what a concept costs beside the base model and diffusers; all weights are random.",
        epilog=f"Cases: {', '.join(CASES)}. Ratios: {', '.join(RATIOS)}.",
    )
    add = parser.add_argument
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    add("--size", choices=("pocket", "pocket_xl", "sd15", "sd21", "sdxl"), help="architecture", default="sd15")
    add("--latent", type=batch, metavar="N", help="side of the latents; None: that of training (64 for sd15)")
    add("--batch", type=batch, metavar="N", help="images at a time", default=1)
    add("--precision", choices=DTYPES, help="of the UNet", default="full")
    add("--steps", type=count, help="sampling steps of the image", default=50)
    add("--repeats", type=count, metavar="N", help="rounds", default=5)
    add("--only", type=words, metavar="CASE[,CASE]", help="cases, or ratios for both of their sides; None: all")
    add("--memory", action="store_true", help="also measure peaks of memory, on CUDA and Linux")
    add("--estimate", action="store_true", help="count operations and memory from shapes; nothing is computed")
    add("--battery", action="store_true", help="SD 1.5 and SDXL in bf16, all that waits for a GPU; needs --json")
    add("--minutes", type=count, metavar="N", help="of the battery; what might take longer is left out", default=8)
    add("--rehearse", action="store_true", help="the battery with small models and few steps, on a CPU too")
    add("--json", type=written, metavar="FILE", help="new file that gets everything that was measured")
    flags = parser.parse_args(arguments)
    known = [*CASES, *RATIOS]
    if unknown := [name for name in flags.only or () if name not in known]:
        parser.error(f"--only: there is no case `{unknown[0]}`{suggestion(unknown[0], known)}")
    if flags.json and Path(flags.json).exists():
        parser.error(f"--json: {flags.json} is there already; name another file")
    device = find_device(flags.device)
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "scripts/benchmark.py", *typed])
    if flags.battery or flags.rehearse:
        if not flags.json:
            parser.error("--battery: name the file for what is measured: --json FILE")
        if device.type != "cuda" and not flags.rehearse:
            parser.error(f"--battery: needs CUDA, not {device.type}; --rehearse runs it with small models")

        def save(result: dict) -> None:
            write(Path(flags.json), (json.dumps({**result, "command": command}, indent=2) + "\n").encode())

        print(battery_table(battery(str(device), flags.minutes, flags.rehearse, save)))
        return
    if flags.memory and device.type != "cuda" and not os.access(PROCESS / "clear_refs", os.W_OK):
        parser.error("--memory: is measured on CUDA and Linux only: leave it out")
    with torch.device("meta"):
        sd = StableDiffusion.from_config(BACKBONES / f"{flags.size}.yaml")
    latent = flags.latent or sd.image_size // sd.vae.factor
    if latent % sd.unet.factor:
        raise UserError(f"--latent: must be a multiple of {sd.unet.factor} for {flags.size}, not {latent}")
    settings = Settings(str(device), flags.size, latent, flags.batch, flags.precision, flags.steps, flags.repeats)
    wanted = {case for name in flags.only or CASES for case in RATIOS.get(name, (name,))}
    names = [name for name in CASES if name in wanted]
    if flags.estimate:
        result = estimate(replace(settings, device="meta"), names)
    else:
        result = benchmark(settings, names, flags.memory)
    result["command"] = command
    print(table(result))
    if flags.json:
        write(Path(flags.json), (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())


if __name__ == "__main__":
    main()
