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


def test_rate_is_unsure_of_certainty():
    assert rate([True, False]) == Estimate(0.5, pytest.approx((0.25 / 6) ** 0.5), 2)
    assert rate(torch.tensor([True] * 32)) == Estimate(1.0, pytest.approx((34 / 36 * 2 / 36 / 36) ** 0.5), 32)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_mean_refuses(values):
    with pytest.raises(ValueError, match="finite values"):
        mean(values)


def gap(first, second):
    return (second - first).mean().item()


def test_bootstrap_of_a_mean_difference_is_its_normal_interval():
    first, second = torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap(gap, first, second, resamples=2000)
    figure = difference(first, second)
    assert low == pytest.approx(figure.value - 1.96 * figure.stderr, abs=0.15 * figure.stderr)
    assert high == pytest.approx(figure.value + 1.96 * figure.stderr, abs=0.15 * figure.stderr)
    ends = [bootstrap(gap, first, second, resamples=50, seed=seed) for seed in (0, 0, 1)]
    assert ends[0] == ends[1] != ends[2]


def test_paired_rows_stay_together():
    first = torch.arange(30.0)[:, None]
    assert bootstrap(gap, first, first + 1, resamples=50) == (1.0, 1.0)


def test_bootstrap_of_a_distance_covers_what_is_expected():
    """Neither the resamples' quantiles nor their mirror image do so here."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(2, 30, 8, generator=generator, dtype=torch.float64)

    expected = mean([gaussian(*draw()) for _ in range(300)]).value
    ends = [bootstrap(gaussian, *draw(), resamples=60, seed=i) for i in range(60)]
    assert sum(low <= expected <= high for low, high in ends) >= 51
    assert any(low > expected or high < expected for low, high in ends)
