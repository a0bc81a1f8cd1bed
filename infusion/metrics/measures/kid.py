"""Kernel distance between two clouds of features, unbiased however few the samples are.

    KID = E k(x, x') + E k(y, y') − 2 E k(x, y),    k(x, y) = (xᵀy / D + 1)³

It is the squared maximum mean discrepancy with the kernel of KID (Bińkowski et al. 2018, arXiv 1801.01401, section 3),
of any features. W2 between N samples of D numbers with N far below D is mostly the price of N; this has the expectation
of the true distance at every N, so the floor of equal distributions is 0, and single values may be below it.
"""

from torch import Tensor

from infusion.metrics.measures.estimate import Estimate


def kid(first: Tensor, second: Tensor) -> Estimate:
    """KID of pairs (x_i, y_i), which may depend on each other: of the same prompt and seed, say.

    The mean over i ≠ j of h_ij = k(x_i, x_j) + k(y_i, y_j) − k(x_i, y_j) − k(x_j, y_i), a U-statistic (Gretton et al.
    2012, lemma 6), with the standard error of its jackknife (Arvesen 1969).

    Args:
        first, second: (N, D) each, N ≥ 3.

    Returns:
        The squared distance, in float64, which may be negative; n is N.

    >>> kid(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [2.0]])).value
    0.0
    """
    x, y = (cloud.detach().cpu().double() for cloud in (first, second))
    cross = kernel(x, y)
    pairs = (kernel(x, x) + kernel(y, y) - cross - cross.mT).fill_diagonal_(0)  # (N, N)
    n, total, rows = len(x), pairs.sum(), pairs.sum(1)
    without = (total - 2 * rows) / ((n - 1) * (n - 2))  # (N,), the statistic with each pair left out
    variance = (n - 1) / n * (without - without.mean()).square().sum()
    return Estimate((total / (n * (n - 1))).item(), variance.sqrt().item(), n)


def kernel(first: Tensor, second: Tensor) -> Tensor:
    """(xᵀy / D + 1)³ of all pairs, (N, D) and (M, D) -> (N, M)."""
    return (first @ second.mT / first.shape[1] + 1) ** 3
