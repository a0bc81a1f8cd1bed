"""Training batches of one concept: latents of its photos, encoded once."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from data.captions import caption_warnings
from data.crop import MIDDLE, Place
from data.dataset import ConceptImages
from data.images import png
from data.preview import sheet
from data.prior import ClassImages
from data.prompts import TEMPLATES
from ldm.models.autoencoder import AutoencoderKL, coverage
from ldm.util.cli import UserError, naming
from ldm.util.files import write
from ldm.util.templates import check_template

BATCH, TILES = 1000, 64  # photos in a batch and on the preview, at most
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentCache:
    """Latents, masks and sizes of N photos, as they are and, with two sides, mirrored."""

    latents: Tensor  # (sides, N, C, h, w) float32, scaled
    masks: Tensor | None  # (sides, N, 1, h, w) float32 in [0, 1]
    sizes: Tensor  # (sides, N, 6) int64, see `photo_sizes`

    @classmethod
    @torch.no_grad()
    def encode(cls, images: ConceptImages, vae: AutoencoderKL, flip: bool) -> "LatentCache":
        """Encodes every photo (and, with `flip`, its mirror image) on the autoencoder's device; the posterior's mean.

        Raises:
            ValueError: the autoencoder gives values that are not finite.
        """
        weight = next(vae.parameters())
        latents, masks = [], []  # of each photo: (sides, C, h, w) and (sides, 1, h, w)
        for photo, mask in tqdm(images, "encoding photos", leave=False):
            sides = [photo, photo.flip(-1)] if flip else [photo]
            latents.append(torch.cat([vae.encode(side[None].to(weight)).float().cpu() for side in sides]))
            if not latents[-1].isfinite().all():
                raise UserError(f"the autoencoder overflows in {weight.dtype}: run it in float32")
            if mask is not None:
                both = torch.stack([mask, mask.flip(-1)] if flip else [mask])
                masks.append(coverage(both, latents[-1].shape[-2:]))
        told = [
            photo_sizes(width, height, images.image_size, place)
            for (width, height), place in zip(images.sizes, images.places, strict=True)
        ]
        sizes = torch.tensor(told).transpose(0, 1)
        return cls(torch.stack(latents, 1), torch.stack(masks, 1) if masks else None, sizes[: 2 if flip else 1])


def photo_sizes(width: int, height: int, side: int, place: Place = MIDDLE) -> tuple[list[int], list[int]]:
    """What SDXL is told of a photo of which a square is used, and of its mirror image (`Context.sizes`).

    Args:
        width, height: of the photo, in pixels.
        side: of the square that it becomes.
        place: where in the photo the square lies.

    Returns:
        Six integers for each: the photo's height and width; top and left of the crop, in the photo as it is after
        resizing; height and width of the crop.
    """
    resized = [round(length * side / min(width, height)) for length in (height, width)]
    top, left = (int(at * (length - side)) for at, length in zip(place[::-1], resized, strict=True))
    mirrored = resized[1] - side - left
    return [height, width, top, left, side, side], [height, width, top, mirrored, side, side]


@dataclass(eq=False)
class ConceptBatches(IterableDataset):
    """Endless batches, drawn with replacement; batch i depends on (seed, i) only, and each process has its part of it.

    Yields latents (B, C, h, w), sizes (B, 6), template (list of B), and, where there are such, mask (B, 1, h, w) and
    names (list of B); with images of the superclass, also such a batch of these, without sizes, masks, names and
    placeholders, as `prior`.

    Attributes:
        cache: what to draw from.
        templates: for each photo, the templates to draw from.
        flip_p: chance of the mirror image.
        rank, world: which of how many processes; each has `batch_size` of the batch's `world · batch_size` samples.
        start: index of the first batch.
        prior: latents (N, C, h, w) of images of the superclass and their prompt.
        names: of the photos, for messages.
    """

    cache: LatentCache
    templates: Sequence[Sequence[str]]
    batch_size: int
    flip_p: float = 0.0
    seed: int = 0
    rank: int = 0
    world: int = 1
    start: int = 0
    prior: tuple[Tensor, str] | None = None
    names: Sequence[str] = ()

    def __iter__(self) -> Iterator[dict]:
        index, whole = self.start, self.world * self.batch_size
        part = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        while True:
            rng = np.random.default_rng([self.seed, 0, index])
            photos = rng.integers(len(self.templates), size=whole)[part]
            sides = (rng.random(whole) < self.flip_p).astype(int)[part]
            choices = rng.random(whole)[part]
            own = [self.templates[photo] for photo in photos]
            template = [options[int(choice * len(options))] for options, choice in zip(own, choices, strict=True)]
            batch: dict[str, Any] = {"latents": self.cache.latents[sides, photos], "template": template}
            batch["sizes"] = self.cache.sizes[sides, photos]
            if self.names:
                batch["names"] = [self.names[photo] for photo in photos]
            if self.cache.masks is not None:
                batch["mask"] = self.cache.masks[sides, photos]
            if self.prior is not None:
                latents, prompt = self.prior
                chosen = rng.integers(len(latents), size=whole)[part]
                batch["prior"] = {"latents": latents[chosen], "template": [prompt] * self.batch_size}
            yield batch
            index += 1


class ConceptData(pl.LightningDataModule):
    """Batches for training one concept; the autoencoder is that of the Lightning module's `sd`.

    It reports on the photos when it is built. A resumed run continues with the batch that follows. `<run>/photos.png`
    shows the first `TILES` photos as they are trained: their squares, dim and grey where the mask is black.

    Args:
        images: the photos.
        batch_size: of every batch, on every device.
        templates: prompts with `{}` for the concept; a photo with captions of its own uses these instead.
        flip_p: chance of the mirror image; 0 for subjects that are not symmetric.
        seed: of the draws.
        prior: images of the superclass, as many in each batch as photos; None has none.

    Raises:
        ValueError: a template without `{}` or with another placeholder; a number out of range.
    """

    def __init__(
        self,
        images: ConceptImages,
        batch_size: int = 4,
        templates: Sequence[str] = TEMPLATES,
        flip_p: float = 0.5,
        seed: int = 23,
        prior: ClassImages | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= batch_size <= BATCH:
            raise UserError(f"batch_size: must be from 1 to {BATCH:,}, not {batch_size}; gradients can be accumulated")
        if not 0 <= seed < 2**32:
            raise UserError(f"seed: must be from 0 to 2**32 - 1, not {seed}")
        if not 0 <= flip_p <= 1:
            raise UserError(f"flip_p: must be between 0 and 1, not {flip_p}")
        if not templates:
            raise UserError("templates: at least one is needed")
        self.templates = [[caption.template for caption in own] or list(templates) for own in images.captions]
        for template in templates:
            check_template("templates", template)
        logger.info("%s: %s", images.root, images.report())
        for warning in images.warnings():
            logger.warning("warning: %s", warning)
        self.images, self.batch_size, self.flip_p, self.seed = images, batch_size, flip_p, seed
        if prior is not None and prior.root is not None and prior.root.resolve() == images.root.resolve():
            raise UserError(f"class_root: {prior.root} is the folder of the photos themselves: name another one")
        self.prior, self.preview = prior, "photos.png"
        self.cache: LatentCache | None = None
        self.prior_latents: Tensor | None = None

    def setup(self, stage: str) -> None:
        """As `encode`, for the module that is trained."""
        self.encode(self.trainer.lightning_module)

    def encode(self, module: pl.LightningModule) -> None:
        """Encodes the photos for a training of this concept (`infusion.training.trainer`).

        Raises:
            ValueError: a text that cannot be trained on, or a size that the model cannot halve as often as it needs.
        """
        if self.cache is None:
            sd, size = module.sd, self.images.image_size
            self._check_texts(module)
            try:
                sd.latent_shape(size, size)
            except ValueError as error:
                raise UserError(f"image_size: {error}") from error
            if self.trainer.is_global_zero:
                first = (self.images[place] for place in range(min(len(self.images), TILES)))
                write(Path(self.trainer.default_root_dir) / self.preview, png(sheet(first)))
            vae = sd.vae.to(self.trainer.strategy.root_device)
            self.cache = LatentCache.encode(self.images, vae, flip=self.flip_p > 0)
            if self.prior is not None:
                with self._one_first(), module.unedited():
                    self.prior_latents = self.prior.latents(sd.to(self.trainer.strategy.root_device))

    def _check_texts(self, module: pl.LightningModule) -> None:
        """Warns of captions that are not read as they stand; UserError for a text that cannot be trained on."""
        captions, tokenizer = list(chain.from_iterable(self.images.captions)), module.sd.text.tokenizer
        for caption in captions:
            with naming(caption.place):
                module.check_caption(caption.template)
        for line in caption_warnings(captions, self.images.superclass, module.noun, tokenizer):
            logger.warning("warning: %s", line)
        if self.prior is not None:
            self.prior.check_prompt(tokenizer)

    @contextmanager
    def _one_first(self) -> Iterator[None]:
        """One process of a machine goes before the others: what it writes, they find."""
        if self.trainer.local_rank:
            self.trainer.strategy.barrier()
        yield
        if not self.trainer.local_rank:
            self.trainer.strategy.barrier()

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        batches = ConceptBatches(
            self.cache,
            self.templates,
            self.batch_size,
            self.flip_p,
            self.seed,
            rank=trainer.global_rank,
            world=trainer.world_size,
            start=trainer.global_step * trainer.accumulate_grad_batches,
            prior=None if self.prior is None else (self.prior_latents, self.prior.prompt),
            names=self.images.names,
        )
        return DataLoader(batches, batch_size=None)
