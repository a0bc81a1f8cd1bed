"""Batches of the pocket world for training CLIPSeg: images, prompts, and masks of what the prompts name.

The concepts that are held out of the world have patterns, colours and shapes that it does not show, and CLIPSeg is to
find them nevertheless: so objects get random colours and textures, and images are bent. The prompts are to mean
something: so each image has two, of which most name what it shows, and some a second object that it does not.
"""

from collections.abc import Iterator
from dataclasses import replace

import kornia.augmentation as K
import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from data.pocket.world import NOUNS, SIZE, Scene, World, caption, draw_scene
from data.prompts import TEMPLATES
from ldm.util.templates import fill

RECOLOURED, TEXTURED, BENT = 0.4, 0.5, 0.5  # share of objects, of objects, of images
PAIRED, DESCRIBED = 0.5, 0.25  # share of images with two objects, of captions among the prompts


BENDING = nn.Sequential(
    K.RandomHorizontalFlip(p=0.5),
    K.RandomAffine(degrees=15, translate=(0.08, 0.08), scale=(0.8, 1.25), shear=12, padding_mode="reflection", p=1),
    K.RandomElasticTransform((33, 33), (8, 8), (3, 3), padding_mode="reflection", p=1),
)
PERTURBING = nn.Sequential(
    K.RandomGaussianBlur((3, 3), (0.3, 1.0), p=0.6),
    K.RandomBrightness((0.9, 1.1), p=1),
    K.RandomRGBShift(0.08, 0.08, 0.08, p=1),
    K.RandomGaussianNoise(std=0.02, p=0.6),
)


def augment(augmentation: nn.Module, images: Tensor, rng: np.random.Generator) -> Tensor:
    """Images (B, C, 64, 64) under an augmentation of kornia's, whose draws depend on `rng` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        return augmentation(images)


def random(rng: np.random.Generator, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform numbers in [low, high), float32."""
    return torch.from_numpy(rng.uniform(low, high, shape)).float()


def grid(count: int) -> tuple[Tensor, Tensor]:
    """x and y of the pixels in [0, 1], each (count, 1, 64, 64)."""
    line = (torch.arange(SIZE) + 0.5) / SIZE
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x.expand(count, 1, -1, -1), y.expand(count, 1, -1, -1)


def textures(rng: np.random.Generator, count: int) -> Tensor:
    """Random two-tone textures (count, 1, 64, 64) in [0, 1]: waves, straight or kinked, alone, added or multiplied."""
    x, y = grid(count)

    def wave() -> Tensor:
        angle, cycles = random(rng, (count, 1, 1, 1), 0, 2 * torch.pi), random(rng, (count, 1, 1, 1), 0.4, 6)
        along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        kink = random(rng, (count, 1, 1, 1), -0.6, 0.3).clamp(min=0)
        bent = along + kink * (2 * (random(rng, (count, 1, 1, 1), 2, 8) * across % 1) - 1).abs()
        return torch.sin(2 * torch.pi * (cycles * bent + random(rng, (count, 1, 1, 1))))

    first, second, kind = wave(), wave(), random(rng, (count, 1, 1, 1), 0, 3).floor()
    level = torch.where(kind == 0, first, torch.where(kind == 1, first + second - 0.3, 2 * first * second))
    return (0.5 + 3 * level).clamp(0, 1)


def repaint(images: Tensor, masks: Tensor, rng: np.random.Generator) -> Tensor:
    """Images (B, 3, 64, 64) in [0, 1] with some objects in other colours, and some with a texture."""
    count = len(images)
    mixing = torch.eye(3)[torch.from_numpy(rng.permuted(np.tile(np.arange(3), (count, 1)), axis=1))]  # (B, 3, 3)
    other = torch.einsum("bij,bjhw->bihw", mixing, images)
    other = torch.where(random(rng, (count, 1, 1, 1)) < 0.25, 1 - other, other)
    gain, tint = random(rng, (count, 3, 1, 1), 0.5, 1.1), random(rng, (count, 3, 1, 1), -0.15, 0.35)
    other = (gain * other + tint).clamp(0, 1)
    images = images + masks * (random(rng, (count, 1, 1, 1)) < RECOLOURED) * (other - images)
    weight = random(rng, (count, 1, 1, 1), 0.3, 1.0) * (random(rng, (count, 1, 1, 1)) < TEXTURED)
    colour = random(rng, (count, 3, 1, 1))
    return images + masks * weight * textures(rng, count) * (colour - images)


def bend(images: Tensor, masks: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Some images and their masks, the same for both, with a mirror, a shear, another size and a smooth swirl."""
    both = torch.cat([images, masks], 1)
    chosen = random(rng, (len(images), 1, 1, 1)) < BENT
    both = torch.where(chosen, augment(BENDING, both, rng), both)
    return both[:, :3], both[:, 3:]


def perturb(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur, noise and another exposure, as a decoder or a camera has them."""
    return augment(PERTURBING, images, rng).clamp(0, 1)


class PromptedBatches(IterableDataset):
    """Endless batches, drawn as they are asked for; batch i depends on (seed, i) only.

    Yields images (B, 3, 64, 64) in [-1, 1], masks (B, 2, 64, 64) in [0, 1], and prompts (2 lists of B). The mask of a
    prompt that names what the image does not show is empty. No combination, pattern or drawing is shown that is kept
    out of the world.
    """

    def __init__(self, batch_size: int, seed: int, start: int = 0, absent: float = 0.2):
        self.batch_size, self.seed, self.start, self.absent = batch_size, seed, start, absent

    def __iter__(self) -> Iterator[dict]:
        world, index = World(), self.start
        while True:
            yield draw_batch(world, np.random.default_rng([self.seed, index]), self.batch_size, self.absent)
            index += 1


def draw_batch(world: World, rng: np.random.Generator, count: int, absent: float = 0.2) -> dict:
    """One batch of `PromptedBatches`; `absent` is the share of second prompts for what the image does not show."""

    def objects() -> tuple[list[Scene], Tensor, Tensor]:
        scenes = [draw_scene(rng) for _ in range(count)]
        images, masks = world.render(scenes, rng)
        return scenes, repaint(images, masks, rng), masks

    scenes, images, masks = objects()
    others, over, cover = objects()
    paired = torch.from_numpy(rng.random(count) < PAIRED)
    paired &= torch.tensor([one.noun != two.noun for one, two in zip(scenes, others, strict=True)])
    cover = cover * paired.view(-1, 1, 1, 1)
    images = images + cover * (over - images)  # the second object lies over the first
    masks = torch.cat([masks * (1 - cover), cover], 1)  # (B, 2, 64, 64)
    named = [list(scenes), list(others)]
    for i, (one, two) in enumerate(zip(scenes, others, strict=True)):
        if rng.random() < absent:
            shown = (one.noun, two.noun) if paired[i] else (one.noun,)
            other = rng.choice([noun for noun in NOUNS if noun not in shown])
            named[1][i], masks[i, 1] = replace(draw_scene(rng), noun=str(other)), 0
        elif not paired[i]:
            named[1][i], masks[i, 1] = one, masks[i, 0]
    images, masks = bend(images, masks, rng)
    return {
        "images": perturb(images, rng) * 2 - 1,
        "masks": masks,
        "prompts": [[prompt(scene, rng) for scene in row] for row in named],
    }


def prompt(scene: Scene, rng: np.random.Generator) -> str:
    """A training template with the scene's noun, or a caption.

    Captions also name colours, which `repaint` may have changed: the noun alone says what to mask.
    """
    if rng.random() < DESCRIBED:
        return caption(scene, rng)
    return fill(TEMPLATES[rng.integers(len(TEMPLATES))], [scene.noun])


class PromptedData(pl.LightningDataModule):
    """The world with prompts and masks; a resumed run goes on with the batch that follows."""

    def __init__(self, batch_size: int, seed: int = 0, absent: float = 0.2):
        super().__init__()
        self.batch_size, self.seed, self.absent = batch_size, seed, absent

    def train_dataloader(self) -> DataLoader:
        batches = PromptedBatches(self.batch_size, self.seed, self.trainer.global_step, self.absent)
        return DataLoader(batches, batch_size=None)
