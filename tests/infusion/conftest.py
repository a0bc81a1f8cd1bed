"""A Stable Diffusion with random weights that runs in milliseconds."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from infusion.attention import ResidualValue
from infusion.methods.infusion import Infusion
from infusion.tokens import Word
from ldm.diffusion.schedule import Schedule
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.text import ClipText
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNet
from ldm.pipeline import StableDiffusion

WIDTH = 32  # of the text encodings


def randomise(module: nn.Module) -> nn.Module:
    """Fills in what is zero at the start, so that every layer matters."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module


def tiny_unet(checkpoint: bool = False) -> UNet:
    """Seven cross-attention layers, of widths 32 and 64."""
    torch.manual_seed(0)
    unet = UNet(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        num_heads=2,
        context_dim=WIDTH,
        checkpoint=checkpoint,
    )
    return randomise(unet).requires_grad_(False).eval()


def infusion_edits(unet: UNet, method: Infusion | None = None) -> dict[str, ResidualValue]:
    """What the method edits before training, layer by layer."""
    method, sd = Infusion() if method is None else method, SimpleNamespace(unet=unet)
    word = Word("cat", ("a {}",))
    return method.terms(sd, method.start(sd, word), word)[0]


def random_residuals(edits: dict[str, nn.Module], scale: float = 1.0) -> None:
    with torch.no_grad():
        for edit in edits.values():
            edit.residual.copy_(scale * torch.randn(edit.residual.shape))


def inputs(rows: int = 2, concepts: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Latents (B, 4, 8, 8), timesteps (B,), text (B, 11, D) and gates (B, K, 11)."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, 4, 8, 8, generator=generator, dtype=dtype)
    text = torch.randn(rows, 11, WIDTH, generator=generator, dtype=dtype)
    gates = torch.rand(rows, concepts, 11, generator=generator, dtype=dtype)
    return latents, torch.tensor([700, 40, 3][:rows]), text, gates


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer()


@pytest.fixture
def sd(tokenizer: Tokenizer) -> StableDiffusion:
    unet = tiny_unet()
    vae = AutoencoderKL(ch=32, ch_mult=(1, 2), num_res_blocks=1)
    text = ClipText(tokenizer, hidden_size=WIDTH, intermediate_size=64, layers=2, heads=2)
    with torch.no_grad():
        text.transformer.text_model.embeddings.token_embedding.weight.mul_(50)  # words that differ
    return StableDiffusion(unet, vae, text, Schedule(), name="tiny", image_size=16).requires_grad_(False).eval()


def fit(
    module: pl.LightningModule,
    folder: Path,
    data: object,
    steps: int,
    ckpt_path: Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
    **options: object,
) -> pl.Trainer:
    """Trains on loaders or a data module, on the CPU, without a word."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer
