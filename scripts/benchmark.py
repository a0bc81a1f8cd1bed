"""Measures what a concept costs on this machine: time, operations and memory, beside the base model and diffusers.

python scripts/benchmark.py --latent 32 --json outputs/benchmark.json    # SD 1.5 on a CPU
python scripts/benchmark.py --size pocket --memory                       # two minutes on a laptop

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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data.prompts import TEMPLATES
from infusion.concepts.concept import Concept, now
from infusion.inject import cross_attention_layers, edited, remove
from infusion.methods.infusion import Infusion
from infusion.sampling.customised import Customised
from infusion.sampling.settings import Settings as Sampling
from infusion.training.trainer import ConceptTrainer
from ldm.pipeline import StableDiffusion
from ldm.util.cli import Parser, UserError, batch, count, find_device, report, suggestion, words, written
from ldm.util.config import BACKBONES
from ldm.util.files import write
from ldm.weights.export import diffusers_tensors, unet_config

DTYPES = {"full": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of weights
NOUNS = ("cat", "dog", "hat", "car", "fish", "tree", "bird", "boat")
SCALE, TIMESTEP, STD = 7.5, 500, 0.02  # guidance; of single calls; of weights that a fresh model has as zeros
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
        if not parameter.any():
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
    network = sd.unet
    if diffusers:
        with torch.device("meta"):  # holds no second copy while the weights are on their way
            peer = UNet2DConditionModel.from_config(unet_config(sd.unet, settings.latent))
        peer.load_state_dict(diffusers_tensors(sd.unet, sd.dtype), assign=True)
        network = partial(peer.eval().to(sd.device), return_dict=False)
    with torch.no_grad(), autocast(sd, settings):
        text = sd.text(["a photo of a cat"] * settings.batch).to(sd.dtype)
        yield lambda: network(latents, timesteps, text)[0] if diffusers else network(latents, timesteps, text)


@contextmanager
def train_step(sd: StableDiffusion, settings: Settings, checkpointing: bool = False) -> Iterator[Run]:
    """An optimiser step of Infusion on cached latents and cached text; gives the loss before it."""
    trainer = ConceptTrainer(sd, Infusion(), NOUNS[0], TEMPLATES).to(sd.device)
    remove(sd.unet)  # the trainer's edits, which are put back below
    optimiser, latents = trainer.configure_optimizers(), noise(sd, settings)
    templates = [TEMPLATES[i % len(TEMPLATES)] for i in range(settings.batch)]
    rows = {"latents": latents, "mask": latents[:, :1].sigmoid(), "template": templates}
    trainer.encode(TEMPLATES)

    def run() -> Tensor:
        with autocast(sd, settings):
            loss = trainer.denoising_loss(rows, torch.Generator().manual_seed(0), {})
        loss.backward()
        optimiser.step()
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
        concepts.append(Concept(residuals, noun, ("a photo of a {}",), sd.architecture, sd.hash))
    return concepts


def autocast(sd: StableDiffusion, settings: Settings) -> AbstractContextManager:
    return sd.autocast("autocast" if settings.precision == "autocast" else "full")


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


def table(result: dict) -> str:
    """Cases and ratios of what `benchmark` gives, in lines."""
    rows = pd.DataFrame(result["times"]).T.join(pd.Series(result["flops"], name="GFLOP") / 1e9)
    if result["memory"]:
        rows = rows.join(
            pd.DataFrame(result["memory"]).T.rename(columns=lambda name: name.replace("bytes", "MiB")) / 2**20
        )
    parts = [f"{result['device']}\n{result['settings']}", rows.to_string(float_format="{:.4g}".format)]
    if result["ratios"]:
        parts.append(pd.DataFrame(result["ratios"]).T.to_string(float_format="{:.3f}".format))
    return "\n\n".join(parts)


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        description="Measures what a concept costs beside the base model and diffusers; all weights are random.",
        epilog=f"Cases: {', '.join(CASES)}. Ratios: {', '.join(RATIOS)}.",
    )
    add = parser.add_argument
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    add("--size", choices=("pocket", "sd15", "sd21"), help="architecture", default="sd15")
    add("--latent", type=batch, metavar="N", help="side of the latents; None: that of training (64 for sd15)")
    add("--batch", type=batch, metavar="N", help="images at a time", default=1)
    add("--precision", choices=DTYPES, help="of the UNet", default="full")
    add("--steps", type=count, help="sampling steps of the image", default=50)
    add("--repeats", type=count, metavar="N", help="rounds", default=5)
    add("--only", type=words, metavar="CASE[,CASE]", help="cases, or ratios for both of their sides; None: all")
    add("--memory", action="store_true", help="also measure peaks of memory, on CUDA and Linux")
    add("--json", type=written, metavar="FILE", help="new file that gets everything that was measured")
    flags = parser.parse_args(arguments)
    known = [*CASES, *RATIOS]
    if unknown := [name for name in flags.only or () if name not in known]:
        parser.error(f"--only: there is no case `{unknown[0]}`{suggestion(unknown[0], known)}")
    if flags.json and Path(flags.json).exists():
        parser.error(f"--json: {flags.json} is there already; name another file")
    device = find_device(flags.device)
    if flags.memory and device.type != "cuda" and not os.access(PROCESS / "clear_refs", os.W_OK):
        parser.error("--memory: is measured on CUDA and Linux only: leave it out")
    with torch.device("meta"):
        sd = StableDiffusion.from_config(BACKBONES / f"{flags.size}.yaml")
    latent = flags.latent or sd.image_size // sd.vae.factor
    if latent % sd.unet.factor:
        raise UserError(f"--latent: must be a multiple of {sd.unet.factor} for {flags.size}, not {latent}")
    settings = Settings(str(device), flags.size, latent, flags.batch, flags.precision, flags.steps, flags.repeats)
    wanted = {case for name in flags.only or CASES for case in RATIOS.get(name, (name,))}
    result = benchmark(settings, [name for name in CASES if name in wanted], flags.memory)
    typed = sys.argv[1:] if arguments is None else arguments
    result["command"] = shlex.join(["python", "scripts/benchmark.py", *typed])
    print(table(result))
    if flags.json:
        write(Path(flags.json), (json.dumps(result, indent=2, allow_nan=False) + "\n").encode())


if __name__ == "__main__":
    main()
