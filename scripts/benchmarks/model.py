"""The model that is measured: a published architecture with random weights, in one of four precisions."""

import os
import platform
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from ldm.pipeline import StableDiffusion, half_precision
from ldm.util.config import ROOT
from scripts.benchmarks.settings import Settings

DTYPES = {"full": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of weights
STD = 0.02  # of weights that a fresh model has as zeros


def backbone(size: str) -> Path:
    """The config of an architecture."""
    return ROOT / "configs" / "backbone" / f"{size}.yaml"


def sides(size: str) -> tuple[int, int]:
    """What a latent's side must be divisible by, and its side in training."""
    with torch.device("meta"):
        sd = StableDiffusion.from_config(backbone(size))
    return sd.unet.factor, sd.image_size // sd.vae.factor


def build_model(settings: Settings) -> StableDiffusion:
    """A frozen model with random weights, the same on every call, none of which is zero throughout.

    A fresh UNet is zero where its residual branches end, so its prediction would be zero and agree with anything.
    """
    torch.manual_seed(0)
    with torch.device(settings.device):
        sd = StableDiffusion.from_config(backbone(settings.size))
    for parameter in sd.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=STD)
    sd.cast(DTYPES[settings.precision])
    return sd.requires_grad_(False).to(settings.device)


def autocast(sd: StableDiffusion, settings: Settings) -> AbstractContextManager:
    """What the UNet is called within."""
    return sd.autocast("autocast" if settings.precision == "autocast" else "full")


def compute_dtype(settings: Settings) -> torch.dtype:
    """What matrix products are computed in."""
    if settings.precision != "autocast":
        return DTYPES[settings.precision]
    return half_precision(torch.device(settings.device))


def describe_device(settings: Settings) -> dict[str, object]:
    """The device's name, its cores and threads, torch and the type that is computed in."""
    device = torch.device(settings.device)
    cuda = device.type == "cuda"
    return {
        "type": device.type,
        "name": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(compute_dtype(settings)).removeprefix("torch."),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
        if cuda
        else None,
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
