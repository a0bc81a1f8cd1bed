"""What can be said exactly of samples of a pocket concept: the world knows its words, its scenes and its concepts.

Prompts are read by the world's own words. A classifier, trained on the world alone, says which background, style and
place it sees in a sample; the leakage (`data.pocket.leakage`) says how much of a sample's background looks
like that of the concept's photos. The ceiling of each is the concept as the world draws it into the same scenes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from clipseg.model import ClipSeg
from data.pocket.backgrounds import BACKGROUNDS
from data.pocket.classifier import SceneClassifier
from data.pocket.concepts import CONCEPTS, PocketConcept
from data.pocket.leakage import leakage
from data.pocket.world import PLACE_WORDS, STYLE_WORDS, Scene, World
from ldm.util.cli import UserError, suggestion
from scripts.pocket.judge import Figure, mean, rate
from scripts.pocket_two.masks import masks_of

ASKED = ("background", "style", "place")
WORDS = {  # part of a scene -> word of the world -> what a caption says
    "background": {name: (words,) for name, words in BACKGROUNDS.items()},
    "style": STYLE_WORDS,
    "place": {name: (words,) for name, words in PLACE_WORDS.items()},
}


def said(prompt: str) -> dict[str, str]:
    """The parts of a scene that a prompt names.

    >>> said("a cartoon of a {} on sand on the left")
    {'background': 'sand', 'style': 'cartoon', 'place': 'left'}
    """
    padded, found = f" {prompt} ", {}
    for part, table in WORDS.items():
        hits = [name for name, phrases in table.items() if any(f" {phrase} " in padded for phrase in phrases)]
        if len(hits) == 1:
            found[part] = hits[0]
    return found


class Exact:
    """Measures samples of one concept of `data.pocket.concepts`.

    Args:
        name: the concept's.
        classifier: of the world's scenes; None where nothing is to be measured.
        clipseg: masks the samples; without one there is no leakage.

    Raises:
        UserError: there is no such concept.
    """

    concepts: Mapping[str, PocketConcept] = CONCEPTS

    def __init__(self, name: str, classifier: SceneClassifier | None = None, clipseg: ClipSeg | None = None) -> None:
        if name not in self.concepts:
            raise UserError(f"--concept: the pocket world has no `{name}`{suggestion(name, list(self.concepts))}")
        self.name, self.classifier, self.clipseg = name, classifier, clipseg

    @classmethod
    def recognise(cls, folder: str | Path) -> str | None:
        """The concept that a folder of photos is named after; None where there is none."""
        name = Path(folder).resolve().name
        return name if name in cls.concepts else None

    @property
    def concept(self) -> PocketConcept:
        return self.concepts[self.name]

    @property
    def described(self) -> str:
        return self.concept.described

    def measure(self, templates: Sequence[str], superclass: str, ours: Tensor, base: Tensor) -> dict[str, Figure]:
        """Rates of right background, style and place, of the photos' background, and the leakage of that.

        Samples whose prompt names the photos' background say nothing about it and are left out of the last two.

        Args:
            templates: B prompts. superclass: the noun that CLIPSeg masks.
            ours, base: samples of the concept and of the base model (B, 3, 64, 64) in [0, 1].

        Returns:
            Metric -> value, stderr, n, and the same of the base model and of the ceiling; no figure where no prompt
            names what it needs.
        """
        scenes = [said(template) for template in templates]
        drawn, masks = self.draw(scenes)
        images = {"ours": ours, "base": base, "ceiling": drawn}
        seen = {which: self.classifier.read(batch) for which, batch in images.items()}
        table: dict[str, dict[str, Figure]] = {}
        for part in ASKED:
            rows = [i for i, scene in enumerate(scenes) if part in scene]
            if rows:
                right = {which: [seen[which][part][i] == scenes[i][part] for i in rows] for which in images}
                table[f"right_{part}"] = {which: rate(hits) for which, hits in right.items()}
        photos = self.concept.background
        elsewhere = [i for i, scene in enumerate(scenes) if scene.get("background", photos) != photos]
        if elsewhere:
            hits = {which: [seen[which]["background"][i] == photos for i in elsewhere] for which in images}
            table["photos_background"] = {which: rate(column) for which, column in hits.items()}
            if self.clipseg is not None and (leaks := self.leaks(images, masks, scenes, elsewhere, superclass)):
                table["leakage"] = leaks
        return {
            metric: figures["ours"] | {"base": figures["base"], "ceiling": figures["ceiling"]}
            for metric, figures in table.items()
        }

    def draw(self, scenes: Sequence[Mapping[str, str]], seed: int = 0) -> tuple[Tensor, Tensor]:
        """The concept in these scenes: images (B, 3, 64, 64) and its masks (B, 64, 64), both in [0, 1]."""
        concept = self.concept
        usual = {"background": concept.background, "style": concept.style, "place": "middle"}
        full = [
            Scene(noun=concept.noun, colour=concept.colour, pattern=concept.pattern, size="medium", **usual | scene)
            for scene in scenes
        ]
        images, masks = World().render(full, np.random.default_rng(seed), concept.drawing, concept.second)
        return images, masks[:, 0]

    def leaks(
        self,
        images: Mapping[str, Tensor],
        masks: Tensor,
        scenes: Sequence[Mapping[str, str]],
        rows: Sequence[int],
        superclass: str,
    ) -> dict[str, Figure]:
        """Leakage of the photos' background into the samples of these rows; {} where all are object all over."""
        rows = [i for i in rows if "style" in scenes[i]]
        if not rows:
            return {}
        prompted, styles = ([scenes[i][part] for i in rows] for part in ("background", "style"))
        figures = {}
        for which, batch in images.items():
            found = masks if which == "ceiling" else self.masks(batch, superclass)
            shares = leakage(batch[rows], found[rows], prompted, self.concept.background, styles)
            if not len(shares.values):
                return {}
            figures[which] = mean(shares.values) | {"left_out": shares.left_out}
        return figures

    def masks(self, images: Tensor, superclass: str) -> Tensor:
        """CLIPSeg's masks (B, H, W) of the superclass, each divided by its maximum."""
        found = masks_of(self.clipseg, images, superclass)
        return found / found.amax((1, 2), keepdim=True).clamp_min(1e-6)
