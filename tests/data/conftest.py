"""An autoencoder that runs in milliseconds, and data modules that are attached to a trainer with one."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from ldm.models.autoencoder import AutoencoderKL
from ldm.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(ch=32, ch_mult=(1, 2), num_res_blocks=1).eval()


def latent_shape(height: int, width: int) -> tuple[int, int, int]:
    """As of a model that halves an image twice."""
    if height % 4 or width % 4:
        raise ValueError(f"height must be a multiple of 4 pixels, not {height}")
    return 4, height // 2, width // 2


def attached(
    data: pl.LightningDataModule, vae: AutoencoderKL, global_step: int = 0, run: Path | None = None
) -> pl.LightningDataModule:
    """With a run folder, the trainer's process is the one that writes."""
    sd = SimpleNamespace(vae=vae, latent_shape=latent_shape, text=SimpleNamespace(tokenizer=Tokenizer()))
    module = SimpleNamespace(sd=sd, unedited=nullcontext, noun="cat", check_caption=lambda caption: None)
    module.parts = [module] * len(getattr(data, "parts", ()))
    data.trainer = SimpleNamespace(
        lightning_module=module,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        global_step=global_step,
        accumulate_grad_batches=2,
        global_rank=0,
        local_rank=0,
        is_global_zero=run is not None,
        default_root_dir=run,
        world_size=1,
    )
    data.setup("fit")
    return data
