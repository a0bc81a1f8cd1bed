import pytest
import torch
from torchmetrics.image.kid import poly_kernel

from infusion.metrics.measures.kid import kid
from infusion.metrics.measures.wasserstein import gaussian


def clouds(n, width, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared, first, second = torch.randn(3, n, width, generator=generator, dtype=torch.float64)
    return shared + first, shared + second + shift  # pairs that have something in common, as of one prompt and seed


def test_it_is_the_published_kernel_s_without_a_sample_and_its_own_partner():
    x, y = clouds(7, 5, shift=0.5)
    off = ~torch.eye(7, dtype=torch.bool)
    within = poly_kernel(x, x)[off].mean() + poly_kernel(y, y)[off].mean()
    assert kid(x, y).value == pytest.approx((within - 2 * poly_kernel(x, y)[off].mean()).item())
    assert kid(x.float(), y.half()).value == pytest.approx(kid(x, y).value, rel=1e-2) and kid(x, y).n == 7


def test_equal_laws_are_at_zero_however_few_the_samples_and_w2_is_not():
    """16 samples of 256 numbers: the distance of normal laws is all price of their number."""
    found = [kid(*clouds(16, 256, seed=seed)) for seed in range(200)]
    values = torch.tensor([one.value for one in found])
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean()) < 3 * error
    far = kid(*clouds(16, 256, shift=0.5))
    assert far.value > 5 * far.stderr
    near, far = (gaussian(*clouds(16, 256, shift=shift)) for shift in (0.0, 0.5))
    assert near > far / 2


def test_its_error_is_that_of_other_samples():
    found = [kid(*clouds(40, 6, shift=0.6, seed=seed)) for seed in range(300)]
    values, errors = (torch.tensor([getattr(one, name) for one in found]) for name in ("value", "stderr"))
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.15)
    truth = values.mean()
    assert 0.87 < ((values - truth).abs() < 1.96 * errors).float().mean() < 0.98
