"""Where in an image a concept may act: boxes, which weigh the foundation's attention mass."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.util.cli import UserError

FORM = "CONCEPT:x0,y0,x1,y1, such as 1:0,0,0.5,1 for the left half"
NUMBER = r"\s*(\d*\.?\d+)\s*"


@dataclass(frozen=True)
class Region:
    """A box for a concept, in shares of the image's width and height from its upper left corner.

    Attributes:
        concept: from 1 on. x0, y0, x1, y1: in [0, 1], the first below the second.

    Raises:
        ValueError: a number out of range.
    """

    concept: int
    x0: float
    y0: float
    x1: float
    y1: float

    def __post_init__(self) -> None:
        if self.concept < 1:
            raise UserError(f"a region's concepts are counted from 1, not {self.concept}")
        if not (0 <= self.x0 < self.x1 <= 1 and 0 <= self.y0 < self.y1 <= 1):
            raise UserError(f"a region's corners are 0 ≤ x0 < x1 ≤ 1 and 0 ≤ y0 < y1 ≤ 1, not {self}")

    def __str__(self) -> str:
        return f"{self.concept}:{self.x0:g},{self.y0:g},{self.x1:g},{self.y1:g}"

    @classmethod
    def parse(cls, text: str) -> "Region":
        """The inverse of `str`; raises ValueError for another form."""
        found = re.fullmatch(rf"\s*(\d+)\s*:{','.join([NUMBER] * 4)}", text)
        if not found:
            raise UserError(f"write a region as {FORM}, not {text[:80]!r}")
        concept, *corners = found.groups()
        return cls(int(concept), *map(float, corners))

    def coverage(self, size: Sequence[int]) -> Tensor:
        """The share of each pixel that the box covers, (h, w) float32 in [0, 1]."""

        def shares(n: int, first: float, last: float) -> Tensor:
            edges = torch.arange(n + 1, dtype=torch.float64) / n
            return (edges[1:].clamp(max=last) - edges[:-1].clamp(min=first)).clamp(min=0) * n

        return torch.outer(shares(size[0], self.y0, self.y1), shares(size[1], self.x0, self.x1)).float()


def regions(text: str) -> tuple[Region, ...]:
    """One or more regions with blanks between them; raises ValueError as `Region.parse` does."""
    return tuple(Region.parse(word) for word in text.split())


def weights(regions: Sequence[Region], concepts: int, size: Sequence[int]) -> Tensor | None:
    """Where each of K concepts acts, (K, h, w) in [0, 1]; None where no concept has a region.

    A concept without a region acts everywhere; one with several, in all of them.

    Raises:
        ValueError: a region of no concept.
    """
    for region in regions:
        if region.concept > concepts:
            raise UserError(f"the region {region} is of no concept: there are {concepts}, counted from 1")
    if not regions:
        return None
    maps = []
    for number in range(1, concepts + 1):
        own = [region.coverage(size) for region in regions if region.concept == number]
        maps.append(torch.stack(own).amax(0) if own else torch.ones(*size))
    return torch.stack(maps)


def shrink(regions: Tensor, tokens: int) -> Tensor:
    """(K, h, w) of the latents -> (K, N) of a layer that sees them smaller: the mean over each token's pixels."""
    factor = isqrt(regions.shape[1] * regions.shape[2] // tokens)
    return F.avg_pool2d(regions[None], factor)[0].flatten(1)
