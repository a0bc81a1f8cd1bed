"""An identity network: features that tell one object of the pocket world from all that look like it.

It is the pocket world's DINO: trained by instance discrimination (Wu et al. 2018, arXiv 1805.01978), with the loss of
SimCLR (Chen et al. 2020, arXiv 2002.05709, eq. 1). Two pictures of one object in different scenes are near, pictures of
look-alikes and spoiled pictures of the object itself are far.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.pocket_two.eye import Eye, spoil
from data.pocket_two.scene import COLOURS, NATURAL, NOUNS, Scene, Thing
from data.pocket_two.textures import WORDS, draw_texture
from data.pocket_two.world import World, draw_scene, draw_textures, draw_thing, second_colours
from ldm.training.optimise import adamw
from ldm.util.config import find
from ldm.weights.checkpoint import load_into

WEIGHTS = "ckpt/pocket_two/identity.safetensors"
FEATURES = 128
ROLES = ("object", "words", "noun", "other noun", "look-alike")  # of a family


class Identity(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> features (B, 128) of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = Eye(questions=1)
        self.head = nn.Linear(self.eye.width, FEATURES)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.head(self.eye(images)[:, 0]).float(), dim=-1)


class IdentityFeatures:
    """The network as a measure takes it: `name`, `width`, and images in [0, 1]."""

    name, width = "identity", FEATURES

    def __init__(self, network: Identity) -> None:
        self.network = network.requires_grad_(False).eval()

    @classmethod
    def load(cls, weights: str | Path = WEIGHTS, device: torch.device | str = "cpu") -> Self:
        """Of a file; raises ValueError for one that is missing or of another network."""
        network = Identity()
        load_into({"": network}, find(weights))
        return cls(network.to(device))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, 64, 64) in [0, 1] -> features (B, 128) of unit length, float32."""
        return self.network(images.to(self.network.head.weight) * 2 - 1)


def draw_look_alike(thing: Thing, rng: np.random.Generator) -> Thing:
    """An object that differs from another in one respect: noun, drawing, a colour, or the texture."""
    while True:
        respect = rng.choice(["noun", "drawing", "colour", "second", "texture", "numbers"])
        if respect == "noun":
            other = replace(thing, noun=str(rng.choice(NOUNS)))
        elif respect == "drawing":
            other = replace(thing, drawing="noto" if thing.drawing == "fluent" else "fluent")
        elif respect == "colour":
            colours = [name for name in (NATURAL, *COLOURS) if name == NATURAL or thing.second in second_colours(name)]
            other = replace(thing, colour=str(rng.choice(colours))) if thing.textures else thing
            if not thing.textures:
                other = replace(thing, colour=str(rng.choice([NATURAL, *COLOURS])))
        elif respect == "second" and thing.textures:
            other = replace(thing, second=str(rng.choice(second_colours(thing.colour))))
        elif respect == "texture":
            textures = draw_textures(rng, worded=bool(rng.random() < 0.7))
            second = thing.second if thing.textures else str(rng.choice(second_colours(thing.colour)))
            other = replace(thing, textures=textures, second=second)
        elif respect == "numbers" and thing.textures:  # the same kinds at other angles, frequencies and phases
            other = replace(thing, textures=tuple(draw_texture(rng, t.kind, free=True) for t in thing.textures))
        else:
            continue
        if other != thing:
            return other


def elsewhere(thing: Thing, rng: np.random.Generator) -> Scene:
    """A random scene with this object alone in it."""
    scene = draw_scene(rng, untrained_ones=None, pairs=0.0)
    return replace(scene, things=(replace(scene.things[0], thing=thing),))


def draw_family(rng: np.random.Generator) -> list[Thing]:
    """An object and what is less like it: told in the same words, its plain noun, another noun in its looks, …"""
    thing = replace(draw_thing(rng), drawing="noto" if rng.random() < 0.5 else "fluent")
    other = str(rng.choice([noun for noun in NOUNS if noun != thing.noun]))
    return [
        thing,
        tell_again(thing, rng),
        Thing(thing.noun, str(rng.choice(["fluent", "noto"]))),
        replace(thing, noun=other, drawing=str(rng.choice(["fluent", "noto"]))),
        draw_look_alike(thing, rng),
    ]


def tell_again(thing: Thing, rng: np.random.Generator) -> Thing:
    """An object that has the same words: its texture is drawn anew, and its drawing is any that training shows."""
    drawing = str(rng.choice(["fluent", "noto"]))
    if not thing.textures:
        return replace(thing, drawing=drawing)
    worded = thing.texture in WORDS
    textures = (draw_texture(rng, thing.texture),) if worded else draw_textures(rng, worded=False)
    return replace(thing, drawing=drawing, textures=textures)


def mush(images: Tensor, masks: Tensor, rng: np.random.Generator, way: int | None = None) -> Tensor:
    """Spoiled pictures that share colours or noun with the object but do not show it: (B, 3, H, W) in [0, 1].

    Each has one of: (0) patches inside the mask shuffled; (1) colours inside the mask averaged over 9 pixels; (2) hue
    turned. `way` chooses one for all.
    """
    result = images.clone()
    ways = rng.integers(3, size=len(images)) if way is None else [way] * len(images)
    for i, way in enumerate(ways):
        image, mask = images[i], masks[i]
        if way == 0:
            changed = shuffle(image, mask, rng)
        elif way == 1:
            weight = F.avg_pool2d(mask[None], 9, stride=1, padding=4).clamp_min(1e-3)
            changed = (F.avg_pool2d((image * mask)[None], 9, stride=1, padding=4) / weight)[0]
        else:
            changed = image[rng.permutation([[1, 2, 0], [2, 0, 1]])[0].tolist()]
        result[i] = image + mask * (changed - image)
    return result.clamp(0, 1)


def shuffle(image: Tensor, mask: Tensor, rng: np.random.Generator, side: int = 6) -> Tensor:
    """Squares of `side` pixels that touch the mask change places with each other: (3, H, W) -> (3, H, W)."""
    rows, columns = np.where(mask[0, side // 2 :: side, side // 2 :: side].numpy() > 0.5)
    corners = [(y * side, x * side) for y, x in zip(rows.tolist(), columns.tolist(), strict=True)]
    result = image.clone()
    for (y, x), k in zip(corners, rng.permutation(len(corners)).tolist(), strict=True):
        from_y, from_x = corners[k]
        patch = image[:, from_y : from_y + side, from_x : from_x + side]
        target = result[:, y : y + side, x : x + side]
        height, width = min(patch.shape[1], target.shape[1]), min(patch.shape[2], target.shape[2])
        target[:, :height, :width] = patch[:, :height, :width]
    return result


class FamilyBatches(IterableDataset):
    """Endless batches of pictures of families; batch i depends on (seed, i) only.

    Yields "first" and "second" (5 F, 3, 64, 64), two scenes of each member of each family in the order of `ROLES`;
    "spoiled" (F, 3, 64, 64), the first picture of each family's object spoiled; all in [-1, 1]; and "same"
    (5 F, 5 F) bool, which members are one object.
    """

    def __init__(self, families: int, seed: int, start: int = 0):
        self.families, self.seed, self.start = families, seed, start

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        step = worker.num_workers if worker else 1
        world, index = World(), self.start + (worker.id if worker else 0)
        while True:
            rng = np.random.default_rng([self.seed, index])
            things = [thing for _ in range(self.families) for thing in draw_family(rng)]
            first, masks = world.render([elsewhere(thing, rng) for thing in things], rng)
            second, _ = world.render([elsewhere(thing, rng) for thing in things], rng)
            spoiled = mush(first[:: len(ROLES)], masks[:: len(ROLES), :1], rng)
            same = torch.tensor([[thing == other for other in things] for thing in things])
            yield {"first": first * 2 - 1, "second": second * 2 - 1, "spoiled": spoiled * 2 - 1, "same": same}
            index += step


class FamilyData(pl.LightningDataModule):
    """Families of look-alikes; a resumed run continues with the next batch. Arguments: see `FamilyBatches`."""

    def __init__(self, families: int, seed: int = 0, workers: int = 0):
        super().__init__()
        self.families, self.seed, self.workers = families, seed, workers

    def train_dataloader(self) -> DataLoader:
        batches = FamilyBatches(self.families, self.seed, self.trainer.global_step)
        return DataLoader(batches, batch_size=None, num_workers=self.workers)


class IdentityTraining(pl.LightningModule):
    """Which second picture shows the same object as a first one, and what is more like it than what.

    The cross-entropy is over all members of all families and the spoiled pictures. A hinge asks for the order that eyes
    give: the object in another scene, what the same words say, the plain noun, and last spoiled pictures and another
    noun in the same looks.
    """

    def __init__(self, identity: Identity, learning_rate: float = 1e-3, temperature: float = 0.07, margin: float = 0.1):
        super().__init__()
        self.identity, self.learning_rate = identity, learning_rate
        self.temperature, self.margin = temperature, margin

    def training_step(self, batch: dict, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        count, families = len(batch["first"]), len(batch["spoiled"])
        pictures = torch.cat([batch["first"], batch["second"], batch["spoiled"]])
        first, second, spoiled = self.identity(spoil(pictures, generator)).split([count, count, families])
        truth = torch.arange(count, device=first.device)
        twins = batch["same"] & ~torch.eye(count, dtype=torch.bool, device=first.device)
        logits = torch.cat([(first @ second.T).masked_fill(twins, -1), first @ spoiled.T], 1) / self.temperature
        back = torch.cat([(second @ first.T).masked_fill(twins, -1), second @ spoiled.T], 1) / self.temperature
        contrast = (F.cross_entropy(logits, truth) + F.cross_entropy(back, truth)) / 2

        members = first.unflatten(0, (families, len(ROLES)))  # (F, 5, 128)
        likeness = torch.einsum("fd,fmd->fm", second[:: len(ROLES)], members)  # of members to their family's object
        same = batch["same"].unflatten(0, (families, len(ROLES)))[:, 0].unflatten(1, (families, len(ROLES)))
        same = same[torch.arange(families), torch.arange(families)]  # (F, 5): members that are the object itself
        worst = torch.maximum(likeness[:, 3], torch.einsum("fd,fd->f", second[:: len(ROLES)], spoiled))
        order = [
            self.hinge(likeness[:, 0], likeness[:, 1])[~same[:, 1]],
            self.hinge(likeness[:, 1], likeness[:, 2])[~same[:, 1] & ~same[:, 2]],
            self.hinge(likeness[:, 2], worst),
        ]
        rank = sum(part.sum() / families for part in order)
        right = (logits.argmax(1) == truth).float().mean()
        self.log_dict({"train/contrast": contrast, "train/rank": rank, "train/right": right}, prog_bar=True)
        return contrast + 2 * rank

    def hinge(self, more: Tensor, less: Tensor) -> Tensor:
        return F.relu(self.margin + less - more)

    def configure_optimizers(self) -> dict:
        return adamw(self.parameters(), self.learning_rate, self.trainer.max_steps, weight_decay=0.05)

    def weights(self) -> dict[str, Tensor]:
        return self.identity.state_dict()
