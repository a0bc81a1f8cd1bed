"""Images of the superclass, which a customised model is to go on drawing (prior preservation: DreamBooth, 3.2)."""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data.dataset import ConceptImages
from data.images import png, text_of
from data.photos import PhotoFolder
from ldm.models.tokenizer import Tokenizer
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError
from ldm.util.config import find
from ldm.util.files import write
from ldm.util.templates import bare, fill, short

COUNT, BATCH = 100_000, 1000  # class images, and how many at a time, at most
RECIPE = {"prompt", "base", "seed", "number", "steps", "scale"}  # the text in a PNG that was drawn here
logger = logging.getLogger(__name__)


class ClassImages:
    """Photos from a folder, or samples of the base model.

    Args:
        prompt: what they show; {} in it is the superclass.
        count: how many.
        root: their folder, which is made. Where it has fewer than `count` images, whatever their names, the rest are
            drawn and written to the first free names `class-<seed>.png`. Each carries its recipe: prompt, SHA-256 of
            the base model, seed, number, steps and scale. None keeps them in memory.
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
        self.prompt = fill(prompt, [] if superclass is None else [bare(superclass)])
        self.count, self.root = count, None if root is None else find(root)
        self.steps, self.scale, self.seed, self.batch_size = steps, scale, seed, batch_size

    def check_prompt(self, tokenizer: Tokenizer) -> None:
        """Raises UserError for a prompt that training does not read whole."""
        if beyond := tokenizer.beyond(self.prompt):
            raise UserError(f"prior: prompt: {short(beyond)} is beyond what training reads: shorten it")

    def latents(self, sd: StableDiffusion) -> Tensor:
        """Latents (N, C, h, w) float32 on the CPU, scaled; `sd` is the base model, without edits.

        Raises:
            UserError: the folder has an image that was drawn for another prompt or by another base model, or one that
                cannot be read.
        """
        if self.root is None:
            images = [image[0] * 2 - 1 for _, image in self.draw(sd, range(self.count))]
        else:
            found, missing = self.look(sd), self.missing()
            for seed, image in self.draw(sd, missing):
                path = self.root / f"class-{seed:06d}.png"
                if not path.exists():  # another machine may have drawn the same one meanwhile
                    write(path, png(image[0], self.recipe(sd, seed)))
            photos = ConceptImages(self.root, sd.image_size, None, mask="none", key="class_root")
            more = f"; {self.count} of {len(photos)} are used, by name" if len(photos) > self.count else ""
            captions = photos.folder.count("caption")
            more += f"; captions ({captions}) are not used" if captions else ""
            logger.info("%s: %s: %s, %d drawn now%s", self.root, self.prompt, found, len(missing), more)
            for warning in photos.warnings():
                logger.warning("warning: %s", warning)
            images = (photos[place][0] for place in range(self.count))
        weight = next(sd.vae.parameters())
        return torch.cat([sd.vae.encode(image[None].to(weight)).float().cpu() for image in images])

    def look(self, sd: StableDiffusion) -> str:
        """What the folder holds, in words; raises UserError for images of another prompt or base model."""
        own, drawn, otherwise = self.recipe(sd, self.seed), 0, 0
        paths = self.there()
        for path in paths:
            said = text_of(path)
            if not said.keys() >= RECIPE:
                continue
            if said["prompt"] != own["prompt"]:
                what = f"{said['prompt']!r}, not {own['prompt']!r}"
                raise UserError(f"class_root: {path} was drawn for {what}: name another folder, or empty this one")
            if said["base"] != own["base"]:
                raise UserError(f"class_root: {path} is of another base model: name another folder, or empty this one")
            drawn, otherwise = drawn + 1, otherwise + any(said[key] != own[key] for key in ("steps", "scale"))
        more = f" ({otherwise} with other steps or another scale)" if otherwise else ""
        return f"{drawn} drawn before{more}, {len(paths) - drawn} without a recipe, as of your own"

    def there(self) -> list[Path]:
        """The images in the folder, sorted by name."""
        return [photo.path for photo in PhotoFolder.look(self.root, "class_root").photos] if self.root.exists() else []

    def recipe(self, sd: StableDiffusion, seed: int) -> dict[str, str]:
        """What the image of a seed depends on, as text."""
        said = {"prompt": self.prompt, "base": sd.hash or "", "seed": seed, "number": seed - self.seed}
        return {key: str(value) for key, value in (said | {"steps": self.steps, "scale": self.scale}).items()}

    def missing(self) -> list[int]:
        """Numbers of the images that the folder lacks; the same on all machines that fill it together."""
        there = {path.stem for path in self.there()}
        free = [i for i in range(self.count) if f"class-{self.seed + i:06d}" not in there]
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
