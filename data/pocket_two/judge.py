"""Reads scenes: the judge of the pocket model's samples, which has no part in training it."""

from typing import NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.pocket_two.batches import ABSENT, THING
from data.pocket_two.eye import Eye, spoil
from data.pocket_two.scene import CHOICES, COLOURS, NOUNS, PLACES
from ldm.training.optimise import adamw

SCENE = {"style": len(CHOICES["style"]), "background": len(CHOICES["background"]), "count": 2}
OBJECT = {name: len(CHOICES[name]) for name in ("noun", "texture", "size", "place")}
ORDER = {"left": 0, "top": 0, "middle": 0, "right": 1, "bottom": 1}  # which of two objects comes first


class SceneReader(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> logits of everything that can be said of the scene.

    Objects are in order: left before right, top before bottom. Colours are present or not, each by itself, since a
    checkered thing has no first colour; an object in natural colours has none but its texture's.
    """

    name, nouns = "pocket two's reader", CHOICES["noun"]

    def __init__(self) -> None:
        super().__init__()
        self.eye = Eye(questions=3)
        self.scene = nn.Linear(self.eye.width, sum(SCENE.values()))
        self.thing = nn.Linear(self.eye.width, sum(OBJECT.values()))
        self.colours = nn.Linear(self.eye.width, len(COLOURS))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits: style (B, 2), background (B, 8), count (B, 2); noun, texture, size, place, colours (B, 2, words)."""
        answers = self.eye(images).float()  # (B, 3, 160)
        scene = dict(zip(SCENE, self.scene(answers[:, 0]).split(list(SCENE.values()), dim=-1), strict=True))
        things = dict(zip(OBJECT, self.thing(answers[:, 1:]).split(list(OBJECT.values()), dim=-1), strict=True))
        return {**scene, **things, "colours": self.colours(answers[:, 1:])}

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, list[str]]:
        """The likeliest word for style, background, and noun, texture, size and place of the first object.

        Images are (B, 3, 64, 64) in [0, 1].
        """
        seen = {name: logits for name, logits in self(images * 2 - 1).items() if name in CHOICES}
        seen = {name: logits[:, 0] if name in OBJECT else logits for name, logits in seen.items()}
        return {name: [CHOICES[name][i] for i in logits.argmax(-1).tolist()] for name, logits in seen.items()}

    @torch.no_grad()
    def sees(self, images: Tensor, noun: str) -> list[bool]:
        """Whether an object of each image (B, 3, 64, 64) in [0, 1] is what a noun names."""
        seen = self(images * 2 - 1)
        there = torch.stack([torch.ones(len(images)), seen["count"].argmax(-1).cpu()], 1).bool()  # (B, 2)
        return ((seen["noun"].argmax(-1).cpu() == NOUNS.index(noun)) & there).any(1).tolist()


class Truth(NamedTuple):
    """What `SceneReader` should say; `there` (B, 2) tells which objects there are."""

    labels: dict[str, Tensor]
    there: Tensor


def truth_of(table: Tensor) -> Truth:
    """Labels of a table (B, 14) of `data.pocket_two.batches.table_of`, objects in the reader's order."""
    things = table[:, 2:].unflatten(1, (2, len(THING))).long()  # (B, 2, 6)
    place = things[..., THING.index("place")].clamp(max=len(PLACES) - 1)
    order = torch.tensor([ORDER[name] for name in CHOICES["place"]])[place]
    there = things[..., 0] != ABSENT
    swapped = there[:, 1] & (order[:, 0] > order[:, 1])
    things = torch.where(swapped[:, None, None], things.flip(1), things)
    labels = {"style": table[:, 0].long(), "background": table[:, 1].long(), "count": there[:, 1].long()}
    for name in OBJECT:
        labels[name] = things[..., THING.index(name)].clamp(max=OBJECT[name] - 1)
    colours = torch.zeros(len(table), 2, len(COLOURS))
    for name in ("colour", "second"):
        index = things[..., THING.index(name)] - 1  # 0 stands for natural colours, or for no second one
        named = (index >= 0) & there
        colours[named] += F.one_hot(index[named], len(COLOURS))
    labels["colours"] = colours.clamp(max=1)
    return Truth(labels, there)


class ReaderTraining(pl.LightningModule):
    """Cross-entropies of everything. Batches: images (B, 3, 64, 64) in [-1, 1], table (B, 14)."""

    def __init__(self, reader: SceneReader, learning_rate: float = 1e-3):
        super().__init__()
        self.reader, self.learning_rate = reader, learning_rate

    def training_step(self, batch: dict, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        read = self.reader(spoil(batch["images"], generator))
        labels, there = truth_of(batch["table"].cpu())
        there = there.to(self.device)
        losses, right = {}, {}
        for name in (*SCENE, *OBJECT):
            logits, label = read[name], labels[name].to(self.device)
            if name in OBJECT:
                logits, label = logits[there], label[there]
            losses[name] = F.cross_entropy(logits, label)
            right[name] = (logits.argmax(-1) == label).float().mean()
        colours = labels["colours"].to(self.device)[there]
        losses["colours"] = 4 * F.binary_cross_entropy_with_logits(read["colours"][there], colours)
        right["colours"] = ((read["colours"][there] > 0) == (colours > 0)).all(-1).float().mean()
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in right.items()}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        return adamw(self.parameters(), self.learning_rate, self.trainer.max_steps, weight_decay=0.05)

    def weights(self) -> dict[str, Tensor]:
        return self.reader.state_dict()
