"""How much of a sample's background looks like that of the concept's photos instead of the prompt's.

Each patch of a sample that shows nothing of the object goes to whichever of the two backgrounds has the nearer patch,
by squared difference of pixels, among fresh renders of both by the world. The share that goes to the photos' is the
leakage: 0 for a model that draws the prompted place, 1 for one that has learned the photos' place with the concept. A
patch that is like neither goes to one of them all the same, so a figure is read beside the base model's.

The world's own renders, and those that went through the pocket autoencoder, leak less than 0.5 % for each of the 112
pairs of backgrounds in one style; the worst are bricks for wood and the night's moon for sand, in cartoons.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.pocket.backgrounds import BACKGROUNDS
from data.pocket.world import STYLES, World, draw_scene

PATCH, STRIDE = 8, 4  # pixels
RENDERS = 24  # of each background


@dataclass(frozen=True)
class Leakage:
    """Shares of background patches.

    Attributes:
        values: (K,) float64 in [0, 1].
        rows: which images they are of, (K,) int64.
        left_out: images without a patch of background.
    """

    values: Tensor
    rows: Tensor
    left_out: int


def leakage(
    images: Tensor,
    masks: Tensor,
    prompted: Sequence[str],
    training: str,
    styles: Sequence[str],
    renders: int = RENDERS,
    seed: int = 0,
) -> Leakage:
    """Leakage of the photos' background into samples.

    Args:
        images: (B, 3, 64, 64) in [0, 1].
        masks: of the objects, (B, 64, 64) in [0, 1]; what is below 0.5 is background.
        prompted: the background that each prompt names, B keys of `BACKGROUNDS`.
        training: the background of the concept's photos.
        styles: the style that each prompt names, B of `STYLES`.
        renders: scenes of each background and style to compare with. seed: of those.

    Raises:
        ValueError: an unknown word, a prompt of the training background, or numbers that do not match.
    """
    if not len(images) == len(masks) == len(prompted) == len(styles):
        raise ValueError("images, masks, prompted backgrounds and styles must be as many of each")
    if masks.shape != (len(images), *images.shape[2:]):
        raise ValueError(f"masks must be (B, H, W) of the images {tuple(images.shape)}, not {tuple(masks.shape)}")
    if not images.isfinite().all():
        raise ValueError("the images have pixels that are not finite")
    for words, table in (((*prompted, training), BACKGROUNDS), (styles, STYLES)):
        if unknown := [word for word in words if word not in table]:
            raise ValueError(f"the world has no {unknown[0]!r}: choose one of {', '.join(table)}")
    if training in prompted:
        raise ValueError(f"a prompt names {training!r}, the training background: nothing can leak there")
    known = {kind: reference(*kind, renders, seed) for kind in {(n, s) for s in styles for n in (*prompted, training)}}
    values, rows = [], []
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        found = patches(image[None], mask[None])  # (n, 192)
        if len(found):
            right, wrong = (torch.cdist(found, known[name, styles[i]]).amin(1) for name in (prompted[i], training))
            values.append((wrong < right).double().mean())
            rows.append(i)
    values = torch.stack(values) if values else torch.empty(0, dtype=torch.float64)
    return Leakage(values, torch.tensor(rows, dtype=torch.int64), len(images) - len(rows))


def patches(images: Tensor, masks: Tensor) -> Tensor:
    """Patches (n, 3 · 8 · 8) of images (B, 3, H, W) in which no pixel of the masks (B, H, W) reaches 0.5."""
    columns = F.unfold(images.float(), PATCH, stride=STRIDE).mT  # (B, n, 192)
    objects = F.max_pool2d(masks[:, None].float(), PATCH, STRIDE).flatten(1)  # (B, n)
    return columns[objects < 0.5]


def reference(background: str, style: str, renders: int = RENDERS, seed: int = 0) -> Tensor:
    """Background patches (n, 192) of random scenes with this background and style: shadows and outlines too."""
    rng = np.random.default_rng([seed, list(BACKGROUNDS).index(background), STYLES.index(style)])
    scenes = [replace(draw_scene(rng, None), background=background, style=style) for _ in range(renders)]
    images, masks = World().render(scenes, rng)
    return patches(images, masks[:, 0])
