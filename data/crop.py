"""Which square of a photo is used: the largest, around its subject or in its middle.

A square's place is how far right and how far down it lies, each from 0 to 1 of the way that the photo leaves it. So the
same place fits a photo and a mask of another resolution.
"""

from typing import Literal, TypeAlias

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

Crop: TypeAlias = Literal["subject", "middle"]
Place: TypeAlias = tuple[float, float]
MIDDLE: Place = (0.5, 0.5)


def around(mask: Image.Image) -> Place:
    """The place around the centre of a mask's mass; the mask is not empty."""
    values = np.asarray(mask, dtype=np.float64)  # (H, W)
    side = min(values.shape)
    place = []
    for mass in (values.sum(0), values.sum(1)):  # along the width, along the height
        centre, free = mass @ (np.arange(len(mass)) + 0.5) / mass.sum(), len(mass) - side
        place.append(round(min(max((centre - side / 2) / free, 0.0), 1.0), 6) if free else 0.5)
    return place[0], place[1]


def share_inside(mask: Image.Image, place: Place) -> float:
    """How much of a mask's mass the square holds, in [0, 1]."""
    values = np.asarray(mask, dtype=np.float64)
    wide = values.shape[1] > values.shape[0]
    mass, at = (values.sum(0), place[0]) if wide else (values.sum(1), place[1])
    start = at * (len(mass) - min(values.shape))
    before = np.interp([start, start + min(values.shape)], np.arange(len(mass) + 1), np.append(0, mass.cumsum()))
    return float((before[1] - before[0]) / mass.sum())


def to_square(image: Image.Image, size: int, place: Place = MIDDLE) -> Tensor:
    """The largest square of an image at a place, resized: (C, size, size) float32, in the image's own range."""
    method = Image.Resampling.BILINEAR if image.mode == "F" else Image.Resampling.LANCZOS
    pixels = np.asarray(ImageOps.fit(image, (size, size), method, centering=place), dtype=np.float32)
    return rearrange(torch.from_numpy(pixels.copy()), "h w -> 1 h w" if pixels.ndim == 2 else "h w c -> c h w")
