"""What the cases are run on: latents, batches and concepts, drawn at random."""

import torch
from torch import Tensor

from data.prompts import TEMPLATES
from infusion.concepts.concept import Concept
from infusion.inject import cross_attention_layers
from ldm.pipeline import StableDiffusion
from scripts.benchmarks.settings import Settings

NOUNS = ("cat", "dog", "hat", "car", "fish", "tree", "bird", "boat")  # the superclasses of up to eight concepts
TIMESTEP = 500  # of the UNet calls that are measured alone


def random_concepts(sd: StableDiffusion, number: int) -> list[Concept]:
    """Infusion's concepts with random residuals, of other superclasses each."""
    generator = torch.Generator().manual_seed(0)
    layers = cross_attention_layers(sd.unet)
    widths = {name: layer.heads * layer.dim_head for name, layer in layers.items()}
    residuals = [
        {name: 0.1 * torch.randn(width, generator=generator) for name, width in widths.items()} for _ in range(number)
    ]
    return [
        Concept(tensors, noun, ("a photo of a {}",), sd.architecture, sd.hash)
        for tensors, noun in zip(residuals, NOUNS, strict=False)
    ]


def training_batch(sd: StableDiffusion, settings: Settings) -> dict[str, Tensor | list[str]]:
    """Random latents (B, C, h, w), masks (B, 1, h, w) and a template for each, the same on every call."""
    latents = drawn(settings.batch, sd, settings)
    return {
        "latents": latents,
        "mask": latents[:, :1].sigmoid(),
        "template": [TEMPLATES[i % len(TEMPLATES)] for i in range(settings.batch)],
    }


def drawn(rows: int, sd: StableDiffusion, settings: Settings) -> Tensor:
    """Standard normal latents (rows, C, h, w), the same on every call, in float32."""
    shape = (rows, sd.vae.embed_dim, settings.latent, settings.latent)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(sd.device)
