"""What can be said exactly of samples of a concept of pocket two: as of the first pocket's, and its looks as well."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from data.pocket_two.concepts import CONCEPTS
from data.pocket_two.exact import Drawing
from data.pocket_two.scene import Placed, Scene
from data.pocket_two.world import World
from scripts.pocket.exact import Exact as OfFirst
from scripts.pocket.exact import said
from scripts.pocket.judge import Figure, mean


class Exact(OfFirst):
    """Beside the first pocket's figures: `silhouette`, `colour` and `texture`, see `data.pocket_two.exact.Drawing`."""

    concepts = CONCEPTS

    def measure(self, templates: Sequence[str], superclass: str, ours: Tensor, base: Tensor) -> dict[str, Figure]:
        """As of the first pocket; looks inside CLIPSeg's masks, also of the ceiling, which the world draws."""
        figures = super().measure(templates, superclass, ours, base)
        if self.clipseg is None:
            return figures
        drawing, drawn = Drawing(self.concept.thing), self.draw([said(template) for template in templates])[0]
        images = {"ours": ours, "base": base, "ceiling": drawn}
        masks = {which: self.masks(batch, superclass).cpu() for which, batch in images.items()}
        for metric in ("silhouette", "colour", "texture"):
            compare = getattr(drawing, metric)
            found = {which: mean(compare(images[which], masks[which])) for which in images}
            figures[metric] = found.pop("ours") | found
        return figures

    def draw(self, scenes: Sequence[Mapping[str, str]], seed: int = 0) -> tuple[Tensor, Tensor]:
        usual = {"background": self.concept.background, "style": "photo", "place": "middle"}
        full = []
        for scene in scenes:
            whole = usual | dict(scene)
            placed = Placed(self.concept.thing, "medium", whole["place"])
            full.append(Scene(whole["style"], whole["background"], (placed,)))
        images, masks = World().render(full, np.random.default_rng(seed))
        return images, masks[:, 0]
