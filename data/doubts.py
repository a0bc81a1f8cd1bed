"""What speaks against a mask, as all commands that meet one say it."""

import numpy as np
from PIL import Image

from data.crop import Place, share_inside

NEARLY_EMPTY, NEARLY_ALL = 0.01, 0.9  # shares of a photo's pixels
INVERTED, FRAME = 0.75, 16  # share of a frame that is white; the frame is this part of the shorter side wide
MOST_INSIDE, LEAST_INSIDE = 0.8, 0.2  # shares of a mask inside the square: below the first a warning, then an error


def covered(mask: Image.Image) -> float:
    """The share of pixels above half of the mask's maximum, in [0, 1]."""
    values = np.asarray(mask)
    return float((values > values.max() / 2).mean())


def doubts(mask: Image.Image, place: Place) -> list[str]:
    """What speaks against a mask (mode F) that is not empty, of which the square at a place is used."""
    found, share = [], covered(mask)
    if share < NEARLY_EMPTY:
        found.append("nearly empty")
    if share > NEARLY_ALL:
        found.append(f"nearly everything is masked ({share:.0%}), so the background is learned too")
    elif looks_inverted(mask):
        found.append("looks inverted: white is what is learned")
    if (inside := share_inside(mask, place)) < MOST_INSIDE:
        found.append(f"only {inside:.0%} of the mask lies in the square that is used")
    return found


def looks_inverted(mask: Image.Image) -> bool:
    """Whether a mask is white along the photo's edges, and more so there than within."""
    values = np.asarray(mask)
    white = values > values.max() / 2
    width = max(1, min(white.shape) // FRAME)
    inner = white[width:-width, width:-width]
    edge = (white.sum() - inner.sum()) / (white.size - inner.size) if inner.size else 0.0
    return bool(edge > INVERTED and edge > white.mean() + 0.1)
