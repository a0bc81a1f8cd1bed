"""Figures with their standard errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt

import torch
from torch import Tensor

TAIL = (1 - 0.95) / 2  # on each side of a bootstrap's interval


@dataclass(frozen=True)
class Estimate:
    """An estimated figure.

    Attributes:
        value: the figure. stderr: its standard error, NaN when one measurement is all there is. n: measurements.
    """

    value: float
    stderr: float
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN: an unknown standard error is None."""
        return {"value": self.value, "stderr": None if isnan(self.stderr) else self.stderr, "n": self.n}


def mean(values: Sequence[float] | Tensor) -> Estimate:
    """Mean of n independent measurements, with the standard error √(Σ (x − x̄)² / (n − 1) / n).

    Args:
        values: (n,), n ≥ 1.

    Raises:
        ValueError: no values, or one that is not finite.

    >>> mean([1.0, 2.0, 3.0, 6.0])
    Estimate(value=3.0, stderr=1.0801234497346435, n=4)
    """
    values = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    n = len(values)
    if n == 0 or not values.isfinite().all():
        raise ValueError(f"a mean is of finite values, at least one: not of {values.tolist()[:8]}")
    return Estimate(values.mean().item(), values.std().item() / sqrt(n) if n > 1 else nan, n)


def difference(first: Sequence[float] | Tensor, second: Sequence[float] | Tensor) -> Estimate:
    """Mean of `second − first`, measured pair by pair: what two measurements share cancels."""
    first, second = (torch.as_tensor(values, dtype=torch.float64, device="cpu") for values in (first, second))
    return mean(second - first)


def rate(hits: Sequence[bool] | Tensor) -> Estimate:
    """Share of hits, with the standard error of Agresti and Coull (1998), which is not 0 when all are hits."""
    n, hit = len(hits), int(sum(bool(one) for one in hits))
    share = (hit + 2) / (n + 4)
    return Estimate(hit / n, sqrt(share * (1 - share) / (n + 4)), n)


def bootstrap(
    statistic: Callable[[Tensor, Tensor], float], first: Tensor, second: Tensor, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of a statistic of pairs, of 95 %, by resampling pairs with replacement (Efron 1979).

    The interval is [θ + q₋ − q, θ + q₊ − q]: θ is the statistic of the samples, q∓ and q are the outer quantiles and
    the median of that of the resamples. Resamples repeat rows, and a distance between clouds is larger for them: by
    more than the interval's width, so that neither the quantiles themselves nor their mirror image hold the expected
    distance. Their spread does have the right size, so it is put around the value.

    Args:
        statistic: of samples as `first` and `second` are.
        first, second: (N, …) each; row i of both belongs together (the same prompt and seed), and is drawn together.
        resamples: how many. seed: of the drawing.

    Returns:
        Lower and upper end.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.empty(resamples, dtype=torch.float64)
    for i in range(resamples):
        rows = torch.randint(len(first), (len(first),), generator=generator)
        drawn[i] = statistic(first[rows], second[rows])
    low, middle, high = drawn.quantile(torch.tensor([TAIL, 0.5, 1 - TAIL], dtype=torch.float64)).tolist()
    value = float(statistic(first, second))
    return value + low - middle, value + high - middle
