"""Images of the superclass, which a customised model is to go on drawing (prior preservation: DreamBooth, 3.2)."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.dataset import ConceptImages, is_image, png
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError
from ldm.util.files import write
from ldm.util.templates import fill

COUNT, BATCH = 100_000, 1000  # class images, and how many at a time, at most


class ClassImages:
    """Photos from a folder, or samples of the base model.

    Args:
        prompt: what they show; {} in it is the superclass.
        count: how many.
        root: their folder, which is made. Where it has fewer than `count` images, whatever their names, the rest are
            drawn and written to the first free names `class-<seed>.png`. None keeps them in memory.
        steps, scale, seed: of the drawing; image i has the seed + i.
        batch_size: images at a time.
        superclass: the noun for {}.

    Raises:
        ValueError: an empty prompt, a {} without a superclass, or a number out of range.
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
        superclass: str | None = None,
    ) -> None:
        if not prompt.strip():
            raise UserError("prior: prompt: what the images show is wanted, such as 'a photo of a cat'")
        for name, value, most in (("count", count, COUNT), ("steps", steps, 999), ("batch_size", batch_size, BATCH)):
            if not 1 <= value <= most:
                raise UserError(f"prior: {name}: must be from 1 to {most:,}, not {value}")
        if not math.isfinite(scale):
            raise UserError(f"prior: scale: must be a finite number, not {scale}")
        if not 0 <= seed < 2**63:
            raise UserError(f"prior: seed: must be from 0 to 2**63 - 1, not {seed}")
        self.prompt = fill(prompt, [] if superclass is None else [superclass])
        self.count, self.root = count, None if root is None else Path(root).expanduser()
        self.steps, self.scale, self.seed, self.batch_size = steps, scale, seed, batch_size

    def latents(self, sd: StableDiffusion) -> Tensor:
        """Latents (N, C, h, w) float32 on the CPU, scaled; `sd` is the base model, without edits."""
        if self.root is None:
            images = [image[0] * 2 - 1 for _, image in self.draw(sd, range(self.count))]
        else:
            for seed, image in self.draw(sd, self.missing()):
                path = self.root / f"class-{seed:06d}.png"
                if not path.exists():  # another machine may have drawn the same one meanwhile
                    write(path, png(image[0]))
            photos = ConceptImages(self.root, sd.image_size, self.prompt, mask="none")
            images = (photos[place][0] for place in range(self.count))
        weight = next(sd.vae.parameters())
        return torch.cat([sd.vae.encode(image[None].to(weight)).float().cpu() for image in images])

    def missing(self) -> list[int]:
        """Numbers of the images that the folder lacks; the same on all machines that fill it together."""
        there = {path.name for path in self.root.glob("*") if is_image(path)}
        free = [i for i in range(self.count) if f"class-{self.seed + i:06d}.png" not in there]
        return free[: max(0, self.count - len(there))]

    def draw(self, sd: StableDiffusion, numbers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Seed and image (1, 3, H, W) in [0, 1] of each number."""
        for start in tqdm(range(0, len(numbers), self.batch_size), f"drawing {self.prompt}", leave=False):
            seeds = [self.seed + number for number in numbers[start : start + self.batch_size]]
            prompts = [self.prompt] * len(seeds)
            images = sd.sample(prompts, steps=self.steps, scale=self.scale, seed=seeds)
            if not images.isfinite().all():
                raise UserError(f"prior: the base model overflows while it draws {self.prompt!r}: use full precision")
            yield from zip(seeds, images.cpu().split(1), strict=True)
