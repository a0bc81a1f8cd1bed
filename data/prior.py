"""Images of the superclass, which a customised model is to go on drawing (prior preservation: DreamBooth, 3.2)."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.dataset import ConceptImages, is_image
from infusion.inject import unedited
from infusion.sampling.pictures import png
from ldm.pipeline import StableDiffusion
from ldm.util.files import create

COUNT, BATCH = 100_000, 1000  # class images, and how many at a time, at most


class ClassImages:
    """Photos from a folder, or samples of the base model.

    Args:
        prompt: what they show.
        count: how many.
        root: their folder, which is made; images that it lacks are drawn and written there. None keeps them in memory.
        steps, scale, seed: of the drawing; image i has the seed + i.
        batch_size: images at a time.

    Raises:
        ValueError: an empty prompt, or a number out of range.
    """

    def __init__(
        self,
        prompt: str,
        count: int = 200,
        root: str | Path | None = None,
        steps: int = 50,
        scale: float = 7.5,
        seed: int = 0,
        batch_size: int = 4,
    ) -> None:
        if not prompt.strip():
            raise ValueError("prior: prompt: what the images show is wanted, such as 'a photo of a cat'")
        for name, value, most in (("count", count, COUNT), ("steps", steps, 999), ("batch_size", batch_size, BATCH)):
            if not 1 <= value <= most:
                raise ValueError(f"prior: {name}: must be from 1 to {most:,}, not {value}")
        if not math.isfinite(scale):
            raise ValueError(f"prior: scale: must be a finite number, not {scale}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"prior: seed: must be from 0 to 2**63 - 1, not {seed}")
        self.prompt, self.count, self.root = prompt, count, None if root is None else Path(root)
        self.steps, self.scale, self.seed, self.batch_size = steps, scale, seed, batch_size

    def latents(self, sd: StableDiffusion) -> Tensor:
        """Latents (N, C, h, w) float32 on the CPU, scaled; the UNet's edits are set aside for the drawing."""
        if self.root is None:
            images = [image[0] * 2 - 1 for _, image in self.draw(sd, range(self.count))]
        else:
            there = list(filter(is_image, self.root.glob("*")))
            for seed, image in self.draw(sd, range(len(there), self.count)):
                create(self.root / f"class-{seed:06d}.png", png(image[0]))
            photos = ConceptImages(self.root, sd.image_size, self.prompt, mask="none")
            images = (photos[place][0] for place in range(self.count))
        weight = next(sd.vae.parameters())
        return torch.cat([sd.vae.encode(image[None].to(weight)).float().cpu() for image in images])

    def draw(self, sd: StableDiffusion, numbers: range) -> Iterator[tuple[int, Tensor]]:
        """Seed and image (1, 3, H, W) in [0, 1] of each number."""
        for start in tqdm(range(numbers.start, numbers.stop, self.batch_size), f"drawing {self.prompt}", leave=False):
            seeds = range(self.seed + start, self.seed + min(start + self.batch_size, numbers.stop))
            with unedited(sd.unet):
                images = sd.sample([self.prompt] * len(seeds), steps=self.steps, scale=self.scale, seed=seeds.start)
            yield from zip(seeds, images.cpu().split(1), strict=True)
