import json
import math

import pytest
import torch

from infusion.metrics.measures.estimate import Estimate, bootstrap, difference, mean, rate
from infusion.metrics.measures.wasserstein import gaussian


def test_mean_and_its_error():
    figure = mean([1.0, 2.0, 3.0])
    assert figure == Estimate(2.0, pytest.approx(1 / 3**0.5), 3)
    assert figure.as_dict() == {"value": 2.0, "stderr": figure.stderr, "n": 3}
    assert mean(torch.tensor([1, 2, 3])) == figure


def test_one_measurement_has_no_known_error():
    one = mean([4.0])
    assert one.value == 4 and math.isnan(one.stderr)
    assert json.loads(json.dumps(one.as_dict())) == {"value": 4.0, "stderr": None, "n": 1}


def test_difference_is_paired():
    assert difference([1.0, 5.0], [2.0, 6.0]) == Estimate(1.0, 0.0, 2)  # what both share cancels
    assert difference([True, False], [True, True]).value == 0.5
    with pytest.raises(ValueError, match="as many values"):
        difference([1.0], [1.0, 2.0])


def test_rate_is_unsure_of_certainty():
    assert rate([True, False]) == Estimate(0.5, pytest.approx((0.25 / 6) ** 0.5), 2)
    assert rate(torch.tensor([True] * 32)) == Estimate(1.0, pytest.approx((34 / 36 * 2 / 36 / 36) ** 0.5), 32)
    with pytest.raises(ValueError, match="at least one"):
        rate([])


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, float("nan")], [float("inf")]])
def test_mean_refuses(values):
    with pytest.raises(ValueError):
        mean(values)


def test_bootstrap_of_a_mean_is_its_normal_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap(lambda v: v.mean().item(), values, resamples=2000, level=0.9)
    figure = mean(values)
    assert low == pytest.approx(figure.value - 1.645 * figure.stderr, abs=0.15 * figure.stderr)
    assert high == pytest.approx(figure.value + 1.645 * figure.stderr, abs=0.15 * figure.stderr)
    assert bootstrap(lambda v: v.mean().item(), values, resamples=50) == bootstrap(
        lambda v: v.mean().item(), values, resamples=50
    )
    other = bootstrap(lambda v: v.mean().item(), values, resamples=50, seed=1)
    assert other != bootstrap(lambda v: v.mean().item(), values, resamples=50)


def test_paired_rows_stay_together():
    first = torch.arange(30.0)[:, None]

    def gap(a, b):
        return (b - a).mean().item()

    assert bootstrap(gap, first, first + 1, paired=True, resamples=50) == (1.0, 1.0)
    low, high = bootstrap(gap, first, first + 1, resamples=200)
    assert low < -1 and high > 3
    with pytest.raises(ValueError, match="as many rows"):
        bootstrap(gap, first, first[:5], paired=True)


def test_bootstrap_of_a_distance_covers_what_is_expected():
    """Neither the resamples' quantiles (5 %) nor their mirror image (28 %) do so here."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(2, 30, 8, generator=generator, dtype=torch.float64)

    expected = mean([gaussian(*draw()) for _ in range(300)]).value
    ends = [bootstrap(gaussian, *draw(), resamples=60, seed=i, level=0.9) for i in range(60)]
    assert sum(low <= expected <= high for low, high in ends) >= 48
    assert any(low > expected or high < expected for low, high in ends)


@pytest.mark.parametrize("options", [{"resamples": 0}, {"level": 1.0}, {"level": 0.0}])
def test_bootstrap_refuses(options):
    with pytest.raises(ValueError, match="no interval"):
        bootstrap(len, torch.zeros(3), **options)
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap(len, torch.zeros(0))
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap(len)
