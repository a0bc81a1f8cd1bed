"""2-Wasserstein distance between two clouds of features: how differently two models draw the same thing.

    W2(P, Q)² = min over joint laws of (x, y) with marginals P and Q of E ‖x − y‖²

Both estimates shrink with the number of samples and never reach 0 for samples of one and the same distribution. So a
distance means something only beside its **floor**: the same function, of as many features, between two batches of the
base model from different seeds.
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def gaussian(first: Tensor, second: Tensor) -> float:
    """W2 of the normal distributions that have the samples' means and covariances.

    W2² = ‖μ − μ'‖² + tr(Σ + Σ' − 2 (Σ^½ Σ' Σ^½)^½) (Dowson and Landau 1982). The trace is
    min over orthogonal O of ‖A − O A'‖² for any A, A' with Σ = AᵀA, Σ' = A'ᵀA', attained at O = U Vᵀ with
    A A'ᵀ = U S Vᵀ (Bhatia, Jain and Lim 2019, theorem 1). It takes no root of a covariance, so covariances of fewer
    samples than features do no harm, and equal clouds are at 0 to rounding.

    Args:
        first, second: (N, D) and (M, D); at least 2 samples each.

    Returns:
        The distance (not squared), ≥ 0, computed in float64.

    >>> gaussian(torch.tensor([[-1.0], [1.0]]), torch.tensor([[2.0], [4.0]]))
    3.0
    """
    first, second = (cloud.detach().cpu().double() for cloud in (first, second))
    means = first.mean(0) - second.mean(0)
    roots = [_root(cloud) for cloud in (first, second)]
    side = max(map(len, roots))
    a, b = (F.pad(root, (0, 0, 0, side - len(root))) for root in roots)  # (side, D) each; empty rows change no AᵀA
    u, _, vh = torch.linalg.svd(a @ b.mT)
    return (means.square().sum() + (a - u @ vh @ b).square().sum()).sqrt().item()


def exact(first: Tensor, second: Tensor) -> float:
    """W2 of the samples themselves: of as many on both sides, the cheapest pairing is an optimal joint law.

    Args:
        first, second: (N, D); at least 2 samples each. Memory N².

    Returns:
        The distance (not squared), ≥ 0, computed in float64.

    >>> exact(torch.tensor([[0.0], [1.0]]), torch.tensor([[4.0], [3.0]]))
    3.0
    """
    first, second = (cloud.detach().cpu().double() for cloud in (first, second))
    # by differences: through squared norms and products, small distances drown in rounding
    costs = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").square()  # (N, N)
    rows, columns = linear_sum_assignment(costs.numpy())
    return costs[rows, columns].mean().sqrt().item()


def _root(cloud: Tensor) -> Tensor:
    """A (min(N, D), D) with AᵀA the covariance of a cloud (N, D)."""
    return torch.linalg.qr(cloud - cloud.mean(0), mode="r").R / (len(cloud) - 1) ** 0.5
