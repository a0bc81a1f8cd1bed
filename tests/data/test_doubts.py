import numpy as np
import pytest
from PIL import Image

from data.crop import MIDDLE
from data.doubts import doubts


def shape(kind: str) -> np.ndarray:
    """A mask of 90 × 60."""
    values = np.zeros((90, 60), np.float32)
    if kind == "whole":
        values[:] = 1
    if kind in ("subject", "inverted"):
        values[30:60, 15:45] = 1
    if kind == "close-up":  # which touches the bottom and reaches far
        values[10:, 4:56] = 1
    if kind == "half":
        values[:, :30] = 1
    if kind == "dot":
        values[45:48, 30:33] = 1
    if kind == "top":
        values[:20] = 1
    return 1 - values if kind == "inverted" else values


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("subject", []),
        ("close-up", ["only 75% of the mask lies"]),
        ("half", ["only 67% of the mask lies"]),
        ("dot", ["nearly empty"]),
        ("whole", ["nearly everything is masked (100%)", "only 67% of the mask lies"]),
        ("inverted", ["looks inverted", "only 60% of the mask lies"]),
        ("top", ["only 25% of the mask lies"]),
    ],
)
@pytest.mark.parametrize("top", [1.0, 1 / 255])
def test_what_speaks_against_a_mask(kind, said, top):
    found = doubts(Image.fromarray(shape(kind) * np.float32(top)), MIDDLE)
    assert len(found) == len(said) and all(map(str.startswith, found, said))
