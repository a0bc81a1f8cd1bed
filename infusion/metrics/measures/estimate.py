"""Figures with their standard errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt

import torch
from torch import Tensor


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
        ValueError: no values, a table of them, or one that is not finite.

    >>> mean([1.0, 2.0, 3.0, 6.0])
    Estimate(value=3.0, stderr=1.0801234497346435, n=4)
    """
    values = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if values.dim() != 1 or len(values) == 0:
        raise ValueError(f"a mean needs a list of at least one value, not shape {tuple(values.shape)}")
    if not values.isfinite().all():
        raise ValueError(f"{(~values.isfinite()).sum()} of {len(values)} values are not finite")
    n = len(values)
    return Estimate(values.mean().item(), values.std().item() / sqrt(n) if n > 1 else nan, n)


def difference(first: Sequence[float] | Tensor, second: Sequence[float] | Tensor) -> Estimate:
    """Mean of `second − first`, measured pair by pair: what two measurements share cancels.

    Raises:
        ValueError: not as many of one as of the other, or whatever `mean` refuses.
    """
    first, second = (torch.as_tensor(values, dtype=torch.float64, device="cpu") for values in (first, second))
    if first.shape != second.shape:
        raise ValueError(f"pairs need as many values on both sides, not {tuple(first.shape)} and {tuple(second.shape)}")
    return mean(second - first)


def rate(hits: Sequence[bool] | Tensor) -> Estimate:
    """Share of hits, with the standard error of Agresti and Coull (1998), which is not 0 when all are hits.

    Raises:
        ValueError: no hits or misses at all.
    """
    n = len(hits)
    if n == 0:
        raise ValueError("a rate needs at least one hit or miss")
    hit = int(sum(bool(one) for one in hits))
    share = (hit + 2) / (n + 4)
    return Estimate(hit / n, sqrt(share * (1 - share) / (n + 4)), n)


def bootstrap(
    statistic: Callable[..., float],
    *samples: Tensor,
    paired: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Confidence interval of a statistic, by resampling rows with replacement (Efron 1979).

    The interval is [θ + q₋ − q, θ + q₊ − q]: θ is the statistic of the samples, q∓ and q are the outer quantiles and
    the median of that of the resamples. Resamples repeat rows, and a distance between clouds is larger for them: by
    more than the interval's width, so that neither the quantiles themselves nor their mirror image hold the expected
    distance. Their spread does have the right size, so it is put around the value.

    Args:
        statistic: samples -> a number.
        samples: each (N, …), rows independent of each other.
        paired: row i of every sample belongs together (the same prompt and seed, say), and is drawn together.
        resamples: how many. seed: of the drawing. level: of confidence, in (0, 1).

    Returns:
        Lower and upper end.

    Raises:
        ValueError: no samples, an empty one, paired ones of different lengths, or numbers out of range.
    """
    if not samples or min(map(len, samples)) == 0:
        raise ValueError("a bootstrap needs samples of at least one row")
    if paired and len({len(sample) for sample in samples}) > 1:
        raise ValueError(f"paired samples have as many rows each, not {', '.join(str(len(s)) for s in samples)}")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"no interval of level {level} from {resamples} resamples")
    generator = torch.Generator("cpu").manual_seed(seed)

    def rows(sample: Tensor) -> Tensor:
        return torch.randint(len(sample), (len(sample),), generator=generator)

    drawn = torch.empty(resamples, dtype=torch.float64)
    for i in range(resamples):
        picks = [rows(samples[0])] * len(samples) if paired else [rows(sample) for sample in samples]
        resampled = [sample[pick.to(sample.device)] for sample, pick in zip(samples, picks, strict=True)]
        drawn[i] = statistic(*resampled)
    tail = (1 - level) / 2
    low, middle, high = drawn.quantile(torch.tensor([tail, 0.5, 1 - tail], dtype=torch.float64)).tolist()
    value = float(statistic(*samples))
    return value + low - middle, value + high - middle
