"""Batches of the pocket world for training CLIPSeg: images, prompts, and masks of what the prompts name.

Concepts have textures and shapes that the world does not show, and CLIPSeg is to find them nevertheless: so half of the
images are bent. Most prompts name what an image shows, and some what it does not.
"""

from collections.abc import Iterator

import kornia.augmentation as K
import numpy as np
import pytorch_lightning as pl
import torch
from kornia.constants import DataKey, Resample
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.pocket_two.captions import noun_phrase, with_article
from data.pocket_two.eye import spoil
from data.pocket_two.scene import NOUNS, ThingWords
from data.pocket_two.world import World, draw_scene

STARTS = ("a photo of", "a photo of", "a picture of", "an image of", "a cartoon of", "")
DESCRIBED = 0.25  # share of prompts that say more than the noun


def prompt(thing: ThingWords, rng: np.random.Generator) -> str:
    """ "a photo of a teapot", or with its looks."""
    words = noun_phrase(thing) if rng.random() < DESCRIBED else thing.noun
    return f"{STARTS[rng.integers(len(STARTS))]} {with_article(words)}".strip()


class Bender:
    """Bends images and masks alike: a mirror, a shear, another size, a smooth swirl."""

    def __init__(self) -> None:
        self.steps = K.AugmentationSequential(
            K.RandomHorizontalFlip(p=0.5),
            K.RandomAffine(degrees=15.0, scale=(0.75, 1.25), shear=15.0, padding_mode="reflection", p=0.5),
            K.RandomElasticTransform(
                kernel_size=(25, 25),
                sigma=(6.0, 6.0),
                alpha=(1.0, 1.0),
                align_corners=False,
                padding_mode="reflection",
                p=0.5,
            ),
            data_keys=["image", "mask"],
            extra_args={DataKey.MASK: {"resample": Resample.BILINEAR, "align_corners": False}},  # masks are soft
        )

    def __call__(self, images: Tensor, masks: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            images, masks = self.steps(images, masks)
        return images.clamp(0, 1), masks.clamp(0, 1)


class PromptedBatches(IterableDataset):
    """Endless batches, drawn as they are asked for; batch i depends on (seed, i) only.

    Yields images (B, 3, 64, 64) in [-1, 1], masks (B, 2, 64, 64) in [0, 1] and prompts (2 lists of B). The mask of a
    prompt that names what the image does not show is empty; `absent` is the share of such prompts where there is one
    object.
    """

    def __init__(self, batch_size: int, seed: int, start: int = 0, absent: float = 0.1):
        self.batch_size, self.seed, self.start, self.absent = batch_size, seed, start, absent

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        step = worker.num_workers if worker else 1
        world, bend, index = World(), Bender(), self.start + (worker.id if worker else 0)
        while True:
            rng = np.random.default_rng([self.seed, index])
            scenes = [draw_scene(rng) for _ in range(self.batch_size)]
            images, masks = world.render(scenes, rng)
            prompts: list[list[str]] = [[], []]
            for i, scene in enumerate(scenes):
                things = scene.words().things
                second = things[-1]
                if len(things) == 1:
                    masks[i, 1] = masks[i, 0]
                    if rng.random() < self.absent:
                        others = [noun for noun in NOUNS if noun != second.noun]
                        second, masks[i, 1] = second._replace(noun=str(rng.choice(others))), 0
                prompts[0].append(prompt(things[0], rng))
                prompts[1].append(prompt(second, rng))
            images, masks = bend(images, masks, seed=int(rng.integers(2**31)))
            images = spoil(images * 2 - 1, torch.Generator().manual_seed(int(rng.integers(2**31))))
            yield {"images": images, "masks": masks, "prompts": prompts}
            index += step


class PromptedData(pl.LightningDataModule):
    """The world with prompts and masks; a resumed run continues with the next batch. Arguments: `PromptedBatches`."""

    def __init__(self, batch_size: int, seed: int = 0, absent: float = 0.1, workers: int = 0):
        super().__init__()
        self.batch_size, self.seed, self.absent, self.workers = batch_size, seed, absent, workers

    def train_dataloader(self) -> DataLoader:
        batches = PromptedBatches(self.batch_size, self.seed, self.trainer.global_step, self.absent)
        return DataLoader(batches, batch_size=None, num_workers=self.workers)
