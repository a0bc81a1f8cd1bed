"""Batches of the pocket world, for training its models."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from data.pocket.world import CHOICES, PLACE_WORDS, Scene, World, caption, draw_scene, draw_sibling
from ldm.util.cli import UserError
from ldm.weights.checkpoint import write


def labels(scenes: list[Scene]) -> Tensor:
    """Each scene as indices into `CHOICES`, shape (B, 7), int64."""
    return torch.tensor([[CHOICES[name].index(getattr(scene, name)) for name in CHOICES] for scene in scenes])


def scenes(table: Tensor) -> list[Scene]:
    """The inverse of `labels`."""
    return [Scene(**{name: CHOICES[name][i] for name, i in zip(CHOICES, row, strict=True)}) for row in table.tolist()]


class WorldBatches(IterableDataset):
    """Endless batches, drawn as they are asked for; batch i depends on (seed, i) only.

    Yields images (B, 3, 64, 64) in [-1, 1], labels (B, 7) and captions (list of B).

    Args:
        everything: include the combinations that a generator is not to be trained on.
        siblings: share of scenes that differ from the one before in a single part; without them a contrast of captions
            can do without most parts. Half of the captions are complete then.
    """

    def __init__(self, batch_size: int, seed: int, start: int = 0, everything: bool = False, siblings: float = 0.0):
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.untrained_ones = None if everything else False
        self.siblings = siblings

    def __iter__(self) -> Iterator[dict]:
        world, index = World(), self.start
        while True:
            rng = np.random.default_rng([self.seed, index])
            batch = self.scenes(rng)
            images, _ = world.render(batch, rng)
            complete = rng.random(len(batch)) < (0.5 if self.siblings else 0.0)
            yield {
                "images": images * 2 - 1,
                "labels": labels(batch),
                "captions": [caption(s, None if whole else rng) for s, whole in zip(batch, complete, strict=True)],
            }
            index += 1

    def scenes(self, rng: np.random.Generator) -> list[Scene]:
        batch = [draw_scene(rng, self.untrained_ones)]
        while len(batch) < self.batch_size:
            if self.siblings and rng.random() < self.siblings:
                batch.append(draw_sibling(batch[-1], rng, self.untrained_ones))
            else:
                batch.append(draw_scene(rng, self.untrained_ones))
        return batch


class WorldData(pl.LightningDataModule):
    """The world as images; a resumed run goes on with the batch that follows. Arguments: see `WorldBatches`."""

    def __init__(self, batch_size: int, seed: int = 0, everything: bool = False, siblings: float = 0.0):
        super().__init__()
        self.batch_size, self.seed, self.everything, self.siblings = batch_size, seed, everything, siblings

    def train_dataloader(self) -> DataLoader:
        start = self.trainer.global_step
        batches = WorldBatches(self.batch_size, self.seed, start, self.everything, self.siblings)
        return DataLoader(batches, batch_size=None)


class LatentBatches(IterableDataset):
    """Endless batches from a fixed set of latents; captions are drawn anew every time.

    Yields latents (B, C, h, w) and captions (list of B). Batch i depends on (seed, i) only. `places_alone` of the
    captions say where the object is, and nothing else.
    """

    def __init__(
        self, latents: Tensor, table: Tensor, batch_size: int, seed: int, start: int = 0, places_alone: float = 0.0
    ):
        self.latents, self.table = latents, table
        self.batch_size, self.seed, self.start, self.places_alone = batch_size, seed, start, places_alone

    def __iter__(self) -> Iterator[dict]:
        index = self.start
        while True:
            rng = np.random.default_rng([self.seed, index])
            rows = torch.from_numpy(rng.integers(len(self.latents), size=self.batch_size))
            captions = [
                PLACE_WORDS[scene.place] if rng.random() < self.places_alone else caption(scene, rng)
                for scene in scenes(self.table[rows])
            ]
            yield {"latents": self.latents[rows].float(), "captions": captions}
            index += 1


class LatentWorldData(pl.LightningDataModule):
    """The world as latents of the module's autoencoder, encoded once and kept in `cache`.

    Args:
        count: number of scenes.
        cache: safetensors file; written when it does not exist, else read. It holds the autoencoder's fingerprint, and
            a cache of another autoencoder is refused.
        places_alone: share of captions such as "on the left". Among the other words, which change the image more, a
            model goes on for thousands of steps without attending to places; by themselves it learns them in hundreds.
    """

    def __init__(self, batch_size: int, count: int, cache: str, seed: int = 0, places_alone: float = 0.0):
        super().__init__()
        self.batch_size, self.count, self.cache, self.seed = batch_size, count, Path(cache), seed
        self.places_alone = places_alone

    def setup(self, stage: str) -> None:
        vae = self.trainer.lightning_module.sd.vae
        fingerprint = str(sum(parameter.detach().double().abs().sum().item() for parameter in vae.parameters()))
        if not self.cache.exists():
            self.encode(vae, fingerprint)
        with safe_open(self.cache, "pt") as file:
            known = file.metadata() or {}
            if (known.get("fingerprint"), known.get("count")) != (fingerprint, str(self.count)):
                raise UserError(
                    f"{self.cache} holds latents of another autoencoder or count: remove it or name another cache"
                )
            self.latents, self.table = file.get_tensor("latents"), file.get_tensor("labels")

    @torch.no_grad()
    def encode(self, vae: torch.nn.Module, fingerprint: str) -> None:
        stream = iter(WorldBatches(100, self.seed))
        device = next(vae.parameters()).device
        latents, table = [], []
        for _ in tqdm(range(self.count // 100), "encoding the world"):
            batch = next(stream)
            with self.trainer.precision_plugin.forward_context():
                latents.append(vae.encode(batch["images"].to(device)).half().cpu())
            table.append(batch["labels"].to(torch.uint8))
        tensors = {"latents": torch.cat(latents), "labels": torch.cat(table)}
        write(self.cache, tensors, {"fingerprint": fingerprint, "count": str(self.count)})

    def train_dataloader(self) -> DataLoader:
        start = self.trainer.global_step
        batches = LatentBatches(self.latents, self.table, self.batch_size, self.seed, start, self.places_alone)
        return DataLoader(batches, batch_size=None)
