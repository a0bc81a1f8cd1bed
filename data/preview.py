"""Photos as training sees them: what a mask leaves light, and which square is used."""

from collections.abc import Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from data.crop import Place

TINT, DIMMED, PREVIEW = (1.0, 0.25, 0.1), 0.35, 1024  # the colour within, the light outside, the longer side
TILE, COLUMNS = 256, 8  # of a sheet: a tile's side, at most, and how many there are beside each other


def overlay(image: Tensor, mask: Tensor, place: Place | None = None) -> Tensor:
    """The photo (3, H, W) as training will see the mask (H, W), which is divided by its maximum.

    With a place, the edges of the square that is used are drawn where it is not the whole photo.
    """
    mask = mask / mask.max().clamp(min=1e-6)
    scale = min(1.0, PREVIEW / max(image.shape[1:]))
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.shape[1:]]
        image, mask = resize(image, size), enlarge(mask, size)
    shown = tinted(image, mask)
    return shown if place is None else with_edges(shown, place)


def tinted(image: Tensor, mask: Tensor) -> Tensor:
    """An image (3, H, W) that is light and tinted within a mask (H, W) in [0, 1], dim and grey without."""
    within = 0.7 * image + 0.3 * image.new_tensor(TINT).view(3, 1, 1)
    without = DIMMED * image.mean(0, keepdim=True).expand(3, -1, -1)
    return mask * within + (1 - mask) * without


def with_edges(image: Tensor, place: Place) -> Tensor:
    """White lines at the two edges of the square that lie within the photo (3, H, W)."""
    height, width = image.shape[1:]
    side, line = min(height, width), max(1, min(height, width) // 200)
    axis, at = (2, place[0]) if width > height else (1, place[1])
    start, image = round(at * (max(height, width) - side)), image.clone()
    for edge in (start, start + side - line):
        if 0 < edge < max(height, width) - line:
            image.narrow(axis, edge, line).fill_(1.0)
    return image


def sheet(photos: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """A grid (3, H', W') in [0, 1] of photos (3, S, S) in [-1, 1] with masks (1, S, S) or None, as they are trained."""
    tiles = []
    for photo, mask in photos:
        size = [min(photo.shape[-1], TILE)] * 2
        image = resize((photo + 1) / 2, size).clamp(0, 1)
        tiles.append(image if mask is None else tinted(image, enlarge(mask[0], size)))
    return make_grid(tiles, COLUMNS, pad_value=1.0)


def enlarge(mask: Tensor, size: Sequence[int]) -> Tensor:
    """(S, S) -> (H, W), bilinear."""
    return resize(mask[None], size)[0].clamp(0, 1)


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """(C, h, w) -> (C, H, W), bilinear."""
    return F.interpolate(image[None], tuple(size), mode="bilinear", antialias=True)[0]
