"""Batches of the pocket world, for training its models."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from data.pocket_two.captions import PLACE_WORDS, caption
from data.pocket_two.scene import CHOICES, Scene, SceneWords, ThingWords
from data.pocket_two.world import SIZE, World, draw_scene
from ldm.util.cli import UserError
from ldm.weights.checkpoint import write

THING = ("noun", "colour", "second", "texture", "size", "place")
SHARD = 10_000  # scenes in a file of latents
LATENTS = ("latents", "halves", "table")  # tensors of such a file, as `LatentBatches` takes them
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
            ThingWords(**{name: CHOICES[name][i] for name, i in zip(THING, thing, strict=True)})
            for thing in things
            if thing[0] != ABSENT
        )
        found.append(SceneWords(CHOICES["style"][row[0]], CHOICES["background"][row[1]], things))
    return found


class WorldBatches(IterableDataset):
    """Endless batches, drawn as they are asked for; batch i depends on (seed, i) only.

    Yields images (B, 3, H, W) in [-1, 1], a table (B, 14) uint8 (`table_of`) and captions (list of B).

    Args:
        everything: include what a generator is not to be trained on: combinations, drawings, overlays.
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
        self.everything = everything
        self.pairs, self.crop = pairs, crop

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()  # worker k of n draws batches k, k + n, …
        step = worker.num_workers if worker else 1
        world, index = World(), self.start + (worker.id if worker else 0)
        while True:
            rng = np.random.default_rng([self.seed, index])
            count = self.batch_size if self.crop is None else self.batch_size // 2
            which = None if self.everything else False
            scenes = [draw_scene(rng, which, self.pairs, held=self.everything) for _ in range(count)]
            images, _ = world.render(scenes, rng)
            if self.crop is not None:
                scenes, images = scenes * 2, cut(images.repeat(2, 1, 1, 1), self.crop, rng)
            captions = [caption(scene.words(), rng) for scene in scenes]
            yield {"images": images * 2 - 1, "table": table_of(scenes), "captions": captions}
            index += step


def cut(images: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """A square of each image at random: (B, 3, H, W) -> (B, 3, side, side)."""
    corners = rng.integers(SIZE - side + 1, size=(len(images), 2)).tolist()
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(images, corners, strict=True)])


class WorldData(pl.LightningDataModule):
    """The world as images; a resumed run continues with the next batch.

    Arguments: see `WorldBatches`; `workers` is the number of processes that draw.
    """

    def __init__(
        self,
        batch_size: int,
        seed: int = 0,
        everything: bool = False,
        pairs: float = 0.4,
        crop: int | None = None,
        workers: int = 0,
    ):
        super().__init__()
        self.batch_size, self.seed, self.everything, self.pairs, self.crop = batch_size, seed, everything, pairs, crop
        self.workers = workers

    def train_dataloader(self) -> DataLoader:
        start = self.trainer.global_step
        batches = WorldBatches(self.batch_size, self.seed, start, self.everything, self.pairs, self.crop)
        return DataLoader(batches, batch_size=None, num_workers=self.workers)


class LatentBatches(IterableDataset):
    """Endless batches from a fixed set of latents; captions are drawn anew every time.

    Yields latents (B, C, h, w) float32 and captions (list of B). Batch i depends on (seed, i) only.

    Args:
        latents: (N, C, h, w) float16.
        halves: (N, C, h / 2, w / 2) float16, the same scenes at half the side.
        table: (N, 14) uint8, see `table_of`.
        half_steps: number of first batches that are of `halves`; each holds twice as many.
        places_alone: share of captions of single objects that say where the object is, and nothing else.
    """

    def __init__(
        self,
        latents: Tensor,
        halves: Tensor,
        table: Tensor,
        batch_size: int,
        seed: int,
        start: int = 0,
        half_steps: int = 0,
        places_alone: float = 0.0,
    ):
        self.latents, self.halves, self.table = latents, halves, table
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.half_steps, self.places_alone = half_steps, places_alone

    def __iter__(self) -> Iterator[dict]:
        index = self.start
        while True:
            rng = np.random.default_rng([self.seed, index])
            half = index < self.half_steps
            latents, count = (self.halves, 2 * self.batch_size) if half else (self.latents, self.batch_size)
            rows = torch.from_numpy(rng.integers(len(latents), size=count))
            captions = []
            for words in words_of(self.table[rows]):
                alone = len(words.things) == 1 and rng.random() < self.places_alone
                captions.append(PLACE_WORDS[words.things[0].place] if alone else caption(words, rng))
            yield {"latents": latents[rows].float(), "captions": captions}
            index += 1


class LatentWorldData(pl.LightningDataModule):
    """The world as latents of the module's autoencoder, encoded once and kept in `cache`.

    Args:
        count: number of scenes, a multiple of `SHARD`.
        cache: folder of safetensors files of `SHARD` scenes each; those that are missing are made, so that an
            interrupted encoding continues. Each holds the autoencoder's fingerprint; others' are refused.
        half_steps: see `LatentBatches`. What words mean is learned for a quarter of the price on scenes of half the
            side, as Stable Diffusion 1 saw 256 pixels before 512.
        places_alone: share of captions such as "on the left". Among the other words, which change the image more, a
            model goes on for thousands of steps without attending to places; by themselves it learns them in hundreds.
        workers: processes that draw scenes for encoding.
    """

    def __init__(
        self,
        batch_size: int,
        count: int,
        cache: str,
        seed: int = 0,
        half_steps: int = 0,
        places_alone: float = 0.0,
        workers: int = 0,
    ):
        super().__init__()
        if count % SHARD:
            raise UserError(f"count must be a multiple of {SHARD}, not {count}")
        self.batch_size, self.count, self.cache, self.seed = batch_size, count, Path(cache), seed
        self.half_steps, self.places_alone = half_steps, places_alone
        self.workers = workers

    def setup(self, stage: str) -> None:
        vae = self.trainer.lightning_module.sd.vae.to(self.trainer.strategy.root_device)
        fingerprint = str(sum(parameter.detach().double().abs().sum().item() for parameter in vae.parameters()))
        parts = {name: [] for name in LATENTS}
        for shard in tqdm(range(self.count // SHARD), "latents of the world"):
            path = self.cache / f"{shard:05}.safetensors"
            if not path.exists():
                self.encode(vae, shard, path, fingerprint)
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("fingerprint") != fingerprint:
                    raise UserError(f"{path} holds latents of another autoencoder: remove it or name another cache")
                for name, tensors in parts.items():
                    tensors.append(file.get_tensor(name))
        self.parts = {name: torch.cat(tensors) for name, tensors in parts.items()}

    @torch.no_grad()
    def encode(self, vae: nn.Module, shard: int, path: Path, fingerprint: str) -> None:
        batches = WorldBatches(100, self.seed, shard * SHARD // 100)
        stream = iter(DataLoader(batches, batch_size=None, num_workers=self.workers))
        device = next(vae.parameters()).device
        parts = {name: [] for name in LATENTS}
        for _ in range(SHARD // 100):
            batch = next(stream)
            images = batch["images"].to(device)
            smaller = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
            with self.trainer.precision_plugin.forward_context():
                parts["latents"].append(vae.encode(images).half().cpu())
                parts["halves"].append(vae.encode(smaller).half().cpu())
            parts["table"].append(batch["table"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, {name: torch.cat(tensors) for name, tensors in parts.items()}, {"fingerprint": fingerprint})

    def train_dataloader(self) -> DataLoader:
        batches = LatentBatches(
            **self.parts,
            batch_size=self.batch_size,
            seed=self.seed,
            start=self.trainer.global_step,
            half_steps=self.half_steps,
            places_alone=self.places_alone,
        )
        return DataLoader(batches, batch_size=None)
