"""Photos of many concepts, for one training of them all (`infusion.training.many`)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from data.crop import Crop
from data.dataset import ConceptImages
from data.latents import ConceptData
from data.prompts import TEMPLATES
from ldm.util.cli import UserError, naming
from ldm.util.config import check_params


@dataclass(frozen=True)
class ConceptEntry:
    """One concept in a config's list `concepts`.

    Attributes:
        name: of its folder of files and of its scalars: letters, digits, "-" and "_".
        superclass: the noun of what it is one of.
        data_root: folder of its photos, as for `ConceptImages`.
        flip_p: chance of the mirror image; None is that of all concepts.
    """

    name: str
    superclass: str
    data_root: str
    flip_p: float | None = None


def entries(concepts: Sequence[Mapping[str, Any]]) -> list[ConceptEntry]:
    """The concepts of a config's list, each a mapping of the attributes of `ConceptEntry`.

    Raises:
        ValueError: no list or an empty one, a key that is unknown, missing or of another type, a name given twice.
    """
    if isinstance(concepts, str) or not concepts:
        raise UserError("concepts: a list is wanted, such as [{name: cat, superclass: cat, data_root: photos/cat}]")
    found: dict[str, ConceptEntry] = {}
    for place, given in enumerate(concepts):
        check_params(ConceptEntry, given, f"concepts.{place}")
        entry = ConceptEntry(**given)
        if not re.fullmatch(r"[\w-]+", entry.name):
            raise UserError(f"concepts.{place}.name: {entry.name!r} names no folder: use letters, digits, - and _")
        if not entry.superclass.strip():
            raise UserError(f"concepts.{place}.superclass: name what the concept is, such as cat")
        if entry.name in found:
            raise UserError(f"concepts.{place}.name: there is another {entry.name!r}: their files would collide")
        found[entry.name] = entry
    return list(found.values())


class ManyConcepts(pl.LightningDataModule):
    """Batches of many concepts: name -> a batch of that concept, the same as its own `ConceptData` would give.

    Args:
        concepts: as for `entries`.
        image_size: side of the squares, in pixels.
        batch_size: photos of each concept in every batch, on every device.
        mask: "auto" or "none", crop: "subject" or "middle", as for `ConceptImages`.
        templates, flip_p, seed: of each concept, as for `ConceptData`.

    Raises:
        ValueError: as `entries`, `ConceptImages` and `ConceptData`; the message names the concept.
    """

    def __init__(
        self,
        concepts: Sequence[Mapping[str, Any]],
        image_size: int,
        batch_size: int = 4,
        mask: Literal["auto", "none"] = "auto",
        templates: Sequence[str] = TEMPLATES,
        flip_p: float = 0.5,
        seed: int = 23,
        crop: Crop = "middle",
    ) -> None:
        super().__init__()
        self.parts: dict[str, ConceptData] = {}
        for entry in entries(concepts):
            own = flip_p if entry.flip_p is None else entry.flip_p
            with naming(f"concepts.{entry.name}"):
                images = ConceptImages(entry.data_root, image_size, entry.superclass, mask, crop)
                self.parts[entry.name] = ConceptData(images, batch_size, templates, own, seed)
                self.parts[entry.name].preview = f"photos/{entry.name}.png"

    def setup(self, stage: str) -> None:
        """Encodes the photos of every concept; raises ValueError as `ConceptData.encode` does."""
        for (name, part), module in zip(self.parts.items(), self.trainer.lightning_module.parts, strict=True):
            part.trainer = self.trainer
            with naming(f"concepts.{name}"):
                part.encode(module)

    def train_dataloader(self) -> dict[str, DataLoader]:
        """A loader for each concept, which Lightning draws from in step: a batch is a dict with a batch of each."""
        return {name: part.train_dataloader() for name, part in self.parts.items()}
