"""Which moment of a training to keep, and where overfitting begins: the rules are this project's own.

Likeness has to pay for what it changes elsewhere. So a later moment is better only where its gain is a tenth greater
than that of the best so far.
"""

from collections.abc import Sequence
from math import hypot, inf

MORE = 1.1  # times the best gain so far is better
Figure = tuple[float, float | None]  # a value and its standard error; None is unknown


def best_of(gains: Sequence[float]) -> int | None:
    """The index of the best moment; None where nothing was gained.

    Args:
        gains: in the order of training: likeness of the concept's samples to the photos above that of the base model's
            samples from the same prompts and seeds.

    >>> best_of([0.1, 0.3, 0.32, 0.2])
    1
    """
    best, most = None, 0.0
    for i, gain in enumerate(gains):
        if gain > MORE * most:
            best, most = i, gain
    return best


def rises(before: Figure, after: Figure) -> bool:
    """Whether a figure rises beyond its error: by more than √(a² + b²), with the standard errors a and b of the two.

    Both have prompts and seeds in common, so that the error of their difference is smaller than this. An unknown error
    is infinite.
    """
    errors = (inf if error is None else error for _, error in (before, after))
    return after[0] - before[0] > hypot(*errors)


def overfits_from(kept: int, likeness: Sequence[Figure], costs: Sequence[Sequence[Figure]]) -> int | None:
    """The index of the moment at which overfitting begins; None where it is not seen.

    It is the first one after the kept one whose likeness does not rise beyond its error, while one of the costs does.
    Both are compared with the kept one's (`rises`).

    Args:
        kept: index of the moment that is kept (`best_of`).
        likeness: of every moment. costs: likewise, each of something that gets worse as it rises.

    >>> overfits_from(0, [(0.5, 0.02), (0.6, 0.02), (0.51, 0.02)], [[(0.1, 0.01), (0.2, 0.01), (0.2, 0.01)]])
    2
    """
    for i in range(kept + 1, len(likeness)):
        if not rises(likeness[kept], likeness[i]) and any(rises(cost[kept], cost[i]) for cost in costs):
            return i
    return None
