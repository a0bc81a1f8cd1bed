import pytest
import torch

from infusion.metrics.measures.wasserstein import exact, gaussian

BOTH = pytest.mark.parametrize("distance", [gaussian, exact])


def cloud(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def bures(a, b):
    """The closed form as it is written: ‖μ − μ'‖² + tr(Σ + Σ' − 2 (Σ^½ Σ' Σ^½)^½)."""
    first, second = torch.cov(a.T), torch.cov(b.T)
    root = covariance_root(first)
    cross = covariance_root(root @ second @ root)
    return ((a.mean(0) - b.mean(0)).square().sum() + (first + second - 2 * cross).trace()).sqrt().item()


@BOTH
@pytest.mark.parametrize("shape", [(40, 5), (5, 40), (2, 3)])
def test_a_cloud_is_at_no_distance_of_itself(distance, shape):
    assert distance(cloud(*shape), cloud(*shape)) < 1e-12
    assert distance(100 + cloud(*shape), 100 + cloud(*shape)) < 1e-10


@BOTH
@pytest.mark.parametrize("shape", [(40, 5), (5, 40)])
def test_translation(distance, shape):
    shift = cloud(1, shape[1], 1)
    assert distance(cloud(*shape), cloud(*shape) + shift) == pytest.approx(shift.norm().item(), rel=1e-9)


@BOTH
@pytest.mark.parametrize("shape", [(40, 5), (5, 40)])
def test_scaling(distance, shape):
    """x -> s x about the mean is an optimal map: W2² = (s − 1)² E ‖x − μ‖²."""
    a = cloud(*shape)
    a = a - a.mean(0)
    spread = a.square().sum() / (len(a) - 1 if distance is gaussian else len(a))
    assert distance(a, 3 * a) == pytest.approx(2 * spread.sqrt().item(), rel=1e-9)


@pytest.mark.parametrize("n, m, d", [(40, 30, 5), (300, 200, 16), (50, 12, 12)])
def test_gaussian_is_the_closed_form(n, m, d):
    mix = cloud(d, d, 3)
    a, b = cloud(n, d), 0.5 + cloud(m, d, 1) @ mix
    assert gaussian(a, b) == pytest.approx(bures(a, b), rel=1e-6)
    assert gaussian(a, b) == pytest.approx(gaussian(b, a), rel=1e-12)


def test_gaussian_of_fewer_samples_than_features():
    a, b = cloud(6, 30), cloud(9, 30, 1)
    assert gaussian(a, b) == pytest.approx(bures(a, b), rel=1e-5)
    # in other coordinates, of which only some are used
    frame = torch.linalg.qr(cloud(50, 30, 2)).Q
    assert gaussian(a @ frame.T, b @ frame.T) == pytest.approx(gaussian(a, b), rel=1e-12)
    flat = torch.cat([a, torch.zeros(6, 4)], 1)
    assert gaussian(flat, torch.cat([b, torch.zeros(9, 4)], 1)) == pytest.approx(gaussian(a, b), rel=1e-12)


def test_gaussian_of_diagonal_covariances():
    """Σ (s − s')² and the gap of the means; corners of a box have exactly these covariances."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3) * (7 / 8) ** 0.5
    first, second = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([4.0, 0.5, 1.0]).double()
    wanted = (9 + 2.25 + 1 + 4) ** 0.5
    assert gaussian(corners * first, corners * second + torch.tensor([0.0, 0.0, 2.0])) == pytest.approx(wanted)


def test_gaussian_of_large_normal_samples():
    a, b = cloud(50_000, 3), cloud(50_000, 3, 1) * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([1.0, 0.0, 0.0])
    assert gaussian(a, b) == pytest.approx((1 + 0.25 + 1) ** 0.5, abs=0.03)


def test_exact_in_one_dimension_sorts():
    a, b = cloud(60, 1), cloud(60, 1, 1).exp()
    wanted = (a.sort(0).values - b.sort(0).values).square().mean().sqrt().item()
    assert exact(a, b) == pytest.approx(wanted, rel=1e-9)


@BOTH
def test_order_and_direction_do_not_matter(distance):
    a, b = cloud(25, 6), 1 + 2 * cloud(25, 6, 1)
    shuffled = a[torch.randperm(25, generator=torch.Generator().manual_seed(5))]
    assert distance(shuffled, b) == pytest.approx(distance(a, b), rel=1e-12)
    assert distance(b, a) == pytest.approx(distance(a, b), rel=1e-12)
    assert distance(a.float(), b.float()) == pytest.approx(distance(a, b), rel=1e-5)


@BOTH
def test_triangle(distance):
    clouds = [cloud(15, 4, i) * (i + 1) + i for i in range(3)]
    ab, bc, ac = distance(clouds[0], clouds[1]), distance(clouds[1], clouds[2]), distance(clouds[0], clouds[2])
    assert ac <= ab + bc and ab <= ac + bc and bc <= ab + ac


@BOTH
def test_the_floor_is_not_zero_and_falls_with_more_samples(distance):
    few, many = (distance(cloud(n, 8), cloud(n, 8, 1)) for n in (20, 320))
    assert 0 < many < few


def test_small_distances_keep_their_digits():
    a = 1000 + cloud(30, 4)
    for distance in (gaussian, exact):
        assert distance(a, a + 1e-6) == pytest.approx(2e-6, rel=1e-4)
