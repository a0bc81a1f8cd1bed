"""Measures samples of a pocket concept: how like its photos they are, and whether they show what the prompt says.

Two judges, neither of which had a part in training the generator or the concept: the pocket CLIP's image tower, and the
classifier of the world's scenes. Their ceiling is the concept itself, drawn by the world into the prompted contexts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.pocket.backgrounds import BACKGROUNDS
from data.pocket.classifier import SceneClassifier
from data.pocket.scene import LAYOUT, PocketConcept
from data.pocket.world import NATURAL, PATTERNS, STYLE_WORDS, STYLES, Scene, World
from infusion.metrics.measures import estimate, fidelity
from infusion.metrics.run.features import POCKET_CONFIG as CLIP_CONFIG
from infusion.metrics.run.features import POCKET_WEIGHTS as CLIP_WEIGHTS
from infusion.metrics.run.features import load_pocket_clip
from ldm.models.clip import Clip
from ldm.util.config import find
from ldm.util.defaults import POCKET_CLASSIFIER as CLASSIFIER_WEIGHTS
from ldm.weights.checkpoint import load_into

Figure = dict[str, float | int | None]  # value, stderr (None of a single measurement), n


@dataclass(frozen=True)
class Context:
    """A place for the concept that it was not photographed in: a prompt with {}, and the scene that it asks for."""

    template: str
    scene: Scene


def contexts(concept: PocketConcept) -> list[Context]:
    """Every background but that of the photos, in every style: 14 contexts, backgrounds first."""
    found = []
    for i, background in enumerate(name for name in BACKGROUNDS if name != concept.background):
        for style in STYLES:
            size, place = LAYOUT[i % len(LAYOUT)]
            scene = Scene(concept.noun, style, concept.colour, concept.pattern, size, background, place)
            found.append(Context(f"{STYLE_WORDS[style][0]} a {{}} {BACKGROUNDS[background]}", scene))
    return found


def drawn(concept: PocketConcept, places: Sequence[Context], seed: int = 0) -> Tensor:
    """The concept as the world draws it in these contexts: (B, 3, 64, 64) in [0, 1]."""
    scenes = [place.scene for place in places]
    return World().render(scenes, np.random.default_rng(seed), concept.drawing, concept.second)[0]


def mean(values: Sequence[float] | Tensor) -> Figure:
    """Mean and standard error of n measurements."""
    return estimate.mean(values).as_dict()


def rate(hits: Sequence[bool]) -> Figure:
    """Share of hits and its standard error, see `estimate.rate`."""
    return estimate.rate(hits).as_dict()


def difference(first: Sequence[float] | Tensor, second: Sequence[float] | Tensor) -> Figure:
    """Mean and standard error of `second - first`, measured pair by pair."""
    return estimate.difference(first, second).as_dict()


def load_classifier(weights: str | Path = CLASSIFIER_WEIGHTS) -> SceneClassifier:
    """The classifier of a file; raises ValueError for one that is missing or of another network."""
    classifier = SceneClassifier()
    load_into({"": classifier}, find(weights))
    return classifier.requires_grad_(False).eval()


class Judge(nn.Module):
    """The pocket CLIP and the classifier of the world's scenes, in evaluation mode."""

    def __init__(self, clip: Clip, classifier: SceneClassifier) -> None:
        super().__init__()
        self.clip, self.classifier = clip, classifier
        self.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        clip_config: str | Path = CLIP_CONFIG,
        clip_weights: str | Path = CLIP_WEIGHTS,
        classifier_weights: str | Path = CLASSIFIER_WEIGHTS,
    ) -> "Judge":
        """Raises ValueError for a missing file, one of another model, or a config without a node `clip`."""
        return cls(load_pocket_clip(clip_config, clip_weights), load_classifier(classifier_weights))

    @torch.no_grad()
    def similarities(self, images: Tensor, photos: Tensor) -> Tensor:
        """CLIP-I: cosine of each image (B, 3, H, W) in [0, 1] with each photo (P, 3, H, W), mean over photos: (B,)."""
        return fidelity.pairwise(self.clip.image_features(images), self.clip.image_features(photos))

    @torch.no_grad()
    def among(self, photos: Tensor) -> Tensor:
        """Each photo's mean cosine with the other photos: (P,)."""
        return fidelity.among(self.clip.image_features(photos))

    def right(self, images: Tensor, concept: PocketConcept, places: Sequence[Context]) -> dict[str, list[bool]]:
        """What the classifier sees, image by image, for images (B, 3, 64, 64) in [0, 1].

        Returns:
            Whether background and style are the prompt's; whether colour and pattern are the concept's, where
            the world has a word for them; `photos_background`: whether the background is that of the concept's photos.
        """
        seen = self.classifier.read(images)
        scenes = [place.scene for place in places]
        asked = ["background", "style"]
        asked += ["colour"] if concept.colour != NATURAL and concept.second is None else []
        asked += ["pattern"] if concept.pattern in PATTERNS[1:] else []
        right = {
            name: [word == getattr(scene, name) for word, scene in zip(seen[name], scenes, strict=True)]
            for name in asked
        }
        return right | {"photos_background": [word == concept.background for word in seen["background"]]}

    def measure(
        self, concept: PocketConcept, places: Sequence[Context], photos: Tensor, base: Tensor, infusion: Tensor
    ) -> dict[str, dict[str, Figure]]:
        """Every figure of one concept.

        Args:
            places: the context of each of B samples.
            photos: (P, 3, H, W). base, infusion: (B, 3, H, W), from the same seeds. All in [0, 1].

        Returns:
            Metric -> {base, infusion, difference (infusion - base, pair by pair), drawn (the ceiling)} -> figure;
            `similarity` has `photos` as well, the photos among themselves.
        """
        images = {"base": base, "infusion": infusion, "drawn": drawn(concept, places)}
        like = {name: self.similarities(batch, photos) for name, batch in images.items()}
        figures = {name: mean(values) for name, values in like.items()}
        figures |= {"difference": difference(like["base"], like["infusion"]), "photos": mean(self.among(photos))}
        table = {"similarity": figures}
        hits = {name: self.right(batch, concept, places) for name, batch in images.items()}
        for metric in hits["base"]:
            table[metric] = {name: rate(columns[metric]) for name, columns in hits.items()}
            table[metric]["difference"] = difference(hits["base"][metric], hits["infusion"][metric])
        return table
