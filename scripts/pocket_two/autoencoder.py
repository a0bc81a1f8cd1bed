"""How well the pocket model's autoencoder keeps what concepts look like.

    python -m scripts.pocket_two.autoencoder --sheet sheet.png        # prints JSON

For the five photos of each concept: peak signal-to-noise ratio of encode and decode, in dB, beside that of a principal
component analysis of 4 × 4 patches with as many numbers for each patch. The sheet shows photos above reconstructions.
"""

import json

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchvision.utils import make_grid, save_image

from data.pocket_two.concepts import CONCEPTS, draw
from data.pocket_two.world import World, draw_scene
from ldm.models.autoencoder import AutoencoderKL
from ldm.util.cli import Parser, report
from ldm.util.config import find, instantiate, load_config
from ldm.weights.checkpoint import load_into

CONFIG = "configs/backbone/pocket_two.yaml"
WEIGHTS = "ckpt/pocket_two/pocket.safetensors"


def psnr(images: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio (dB) of images (B, 3, H, W) in [0, 1]: the mean over images."""
    errors = (images - others.clamp(0, 1)).square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())


class PatchAnalysis:
    """Principal components of square patches, fitted to images (N, 3, H, W)."""

    def __init__(self, images: Tensor, side: int, numbers: int):
        self.side = side
        patches = self.split(images)[:200_000]
        self.mean = patches.mean(0)
        self.basis = torch.linalg.svd(patches - self.mean, full_matrices=False).Vh[:numbers]  # (numbers, 3 side²)

    def split(self, images: Tensor) -> Tensor:
        return rearrange(images, "b c (h p) (w q) -> (b h w) (c p q)", p=self.side, q=self.side)

    def __call__(self, images: Tensor) -> Tensor:
        """Images as the components keep them."""
        patches = (self.split(images) - self.mean) @ self.basis.T @ self.basis + self.mean
        height, side = images.shape[2] // self.side, self.side
        return rearrange(patches, "(b h w) (c p q) -> b c (h p) (w q)", b=len(images), h=height, p=side, q=side)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] encoded and decoded, clipped to [0, 1]."""
    return (vae.decode(vae.encode(images * 2 - 1)) / 2 + 0.5).clamp(0, 1)


@report
def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=CONFIG, help="backbone config")
    parser.add_argument("--vae", default=None, help="weights of the autoencoder alone; none: the shipped model's")
    parser.add_argument("--sheet", default=None, help="PNG to write photos and reconstructions to")
    flags = parser.parse_args()

    vae = instantiate(load_config([find(flags.config)]).sd.params.vae)
    load_into({"": vae} if flags.vae else {"first_stage_model.": vae}, find(flags.vae or WEIGHTS))
    world, rng = World(), np.random.default_rng(9)
    scenes, _ = world.render([draw_scene(rng) for _ in range(2000)], rng)
    analysis = PatchAnalysis(scenes, vae.factor, vae.embed_dim)
    with torch.no_grad():
        spread = float(vae.encode(scenes[:1000] * 2 - 1).std())
    figures, rows = {}, []
    for seed, (name, concept) in enumerate(CONCEPTS.items()):
        photos, _ = draw(concept, world, seed)
        made = reconstruct(vae, photos)
        figures[name] = {"psnr": round(psnr(photos, made), 2), "pca": round(psnr(photos, analysis(photos)), 2)}
        rows += [photos, made]
    means = {key: round(float(np.mean([f[key] for f in figures.values()])), 2) for key in ("psnr", "pca")}
    worst = min(figures.items(), key=lambda item: item[1]["psnr"])
    fresh = round(psnr(scenes[:200], reconstruct(vae, scenes[:200])), 2)
    print(json.dumps({"concepts": figures, "mean": means, "worst": worst, "scenes": fresh, "std": spread}, indent=2))
    if flags.sheet:
        pairs = [torch.cat(rows[i : i + 4 : 2]) for i in range(0, len(rows), 4)]
        made = [torch.cat(rows[i + 1 : i + 4 : 2]) for i in range(0, len(rows), 4)]
        grid = torch.cat([row for both in zip(pairs, made, strict=True) for row in both])
        save_image(make_grid(F.interpolate(grid, scale_factor=2.0), 10, pad_value=1.0), flags.sheet)


if __name__ == "__main__":
    main()
