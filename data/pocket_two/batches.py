"""Batches of the pocket world, for training its models."""

from collections.abc import Iterator

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from data.pocket_two.captions import caption
from data.pocket_two.scene import CHOICES, Scene, SceneWords, ThingWords
from data.pocket_two.world import SIZE, World, draw_scene

THING = ("noun", "colour", "second", "texture", "size", "place")
ABSENT = 255  # in a table's columns of a second object that is not there


def table_of(scenes: list[Scene]) -> Tensor:
    """What can be said of scenes, as indices into `CHOICES`: (B, 14) uint8.

    Columns: style, background, then noun, colour, second colour, texture, size and place of each object.
    """
    rows = []
    for scene in scenes:
        words = scene.words()
        row = [CHOICES["style"].index(words.style), CHOICES["background"].index(words.background)]
        for thing in words.things:
            row += [CHOICES[name].index(getattr(thing, name)) for name in THING]
        rows.append(row + [ABSENT] * (2 + 2 * len(THING) - len(row)))
    return torch.tensor(rows, dtype=torch.uint8)


def words_of(table: Tensor) -> list[SceneWords]:
    """The inverse of `table_of`, as far as words go."""
    found = []
    for row in table.tolist():
        things = [row[2 : 2 + len(THING)], row[2 + len(THING) :]]
        things = tuple(
            ThingWords(*(CHOICES[name][i] for name, i in zip(THING, thing, strict=True)))
            for thing in things
            if thing[0] != ABSENT
        )
        found.append(SceneWords(CHOICES["style"][row[0]], CHOICES["background"][row[1]], things))
    return found


class WorldBatches(IterableDataset):
    """Endless batches, drawn as they are asked for; batch i depends on (seed, i) only.

    Yields images (B, 3, H, W) in [-1, 1], a table (B, 14) uint8 (`table_of`) and captions (list of B).

    Args:
        everything: include the combinations that a generator is not to be trained on.
        pairs: share of scenes with two objects.
        crop: side of squares cut out at random, two of each scene; None for whole scenes.
    """

    def __init__(
        self,
        batch_size: int,
        seed: int,
        start: int = 0,
        everything: bool = False,
        pairs: float = 0.4,
        crop: int | None = None,
    ):
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.untrained_ones = None if everything else False
        self.pairs, self.crop = pairs, crop

    def __iter__(self) -> Iterator[dict]:
        world, index = World(), self.start
        while True:
            rng = np.random.default_rng([self.seed, index])
            count = self.batch_size if self.crop is None else self.batch_size // 2
            scenes = [draw_scene(rng, self.untrained_ones, self.pairs) for _ in range(count)]
            images, _ = world.render(scenes, rng)
            if self.crop is not None:
                scenes, images = scenes * 2, cut(images.repeat(2, 1, 1, 1), self.crop, rng)
            captions = [caption(scene.words(), rng) for scene in scenes]
            yield {"images": images * 2 - 1, "table": table_of(scenes), "captions": captions}
            index += 1


def cut(images: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """A square of each image at random: (B, 3, H, W) -> (B, 3, side, side)."""
    corners = rng.integers(SIZE - side + 1, size=(len(images), 2)).tolist()
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners, strict=True)])


class WorldData(pl.LightningDataModule):
    """The world as images; a resumed run continues with the next batch. Arguments: see `WorldBatches`."""

    def __init__(
        self, batch_size: int, seed: int = 0, everything: bool = False, pairs: float = 0.4, crop: int | None = None
    ):
        super().__init__()
        self.batch_size, self.seed, self.everything, self.pairs, self.crop = batch_size, seed, everything, pairs, crop

    def train_dataloader(self) -> DataLoader:
        start = self.trainer.global_step
        batches = WorldBatches(self.batch_size, self.seed, start, self.everything, self.pairs, self.crop)
        return DataLoader(batches, batch_size=None)
