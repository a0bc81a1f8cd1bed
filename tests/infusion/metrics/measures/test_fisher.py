import pytest
import torch

from infusion.concepts.concept import Concept
from infusion.inject import cross_attention_layers
from infusion.metrics.measures.estimate import mean
from infusion.metrics.measures.fisher import errors
from infusion.sampling.customised import Customised
from infusion.sampling.settings import Settings
from ldm.diffusion.schedule import Schedule
from ldm.util.cli import UserError

EPS, V = Schedule(), Schedule(prediction_type="v_prediction")
LATENTS = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def base(noisy, timesteps):
    """Something that depends on place, noise level and sample."""
    return torch.tanh(noisy.roll(1, 3)) + timesteps.view(-1, 1, 1, 1) / 1000


def shifted(by):
    return lambda noisy, timesteps: base(noisy, timesteps) + (by(timesteps).view(-1, 1, 1, 1) if callable(by) else by)


@pytest.mark.parametrize("schedule", [EPS, V])
@pytest.mark.parametrize("weighting", ["eps", "score"])
def test_the_same_model_is_at_exactly_zero(schedule, weighting):
    found = errors(base, base, LATENTS, schedule, range(6), weighting=weighting)
    assert found.values.shape == found.timesteps.shape == (6, 10)
    assert not found.values.any()
    assert found.estimate().as_dict() == {"value": 0.0, "stderr": 0.0, "n": 6}


def test_a_constant_counts_squared():
    found = errors(base, shifted(0.03), LATENTS, EPS, range(6))
    assert found.values.dtype == torch.float64
    torch.testing.assert_close(found.values, torch.full((6, 10), 9e-4).double(), rtol=1e-4, atol=0)
    assert found.estimate().value == pytest.approx(9e-4, rel=1e-4)


def test_scores_are_divided_by_the_variance():
    found = errors(base, shifted(0.5), LATENTS, EPS, range(6), weighting="score")
    variance = 1 - EPS.alphas_cumprod.double()
    torch.testing.assert_close(found.values, 0.25 / variance[found.timesteps], rtol=1e-4, atol=0)
    many = errors(base, shifted(0.5), torch.zeros(600, 1, 1, 1), EPS, range(600), weighting="score").estimate()
    assert abs(many.value - 0.25 * (1 / variance).mean().item()) < 4 * many.stderr


def test_v_predictions_count_as_noise():
    """ε = √ᾱ v + σ x_t, so a change δ of v is √ᾱ δ of ε."""
    found = errors(base, shifted(0.5), LATENTS, V, range(6))
    torch.testing.assert_close(found.values, 0.25 * V.alphas_cumprod.double()[found.timesteps], rtol=1e-4, atol=1e-12)


def test_outside_of_regions():
    """Σ (1 − m) e² / (C Σ (1 − m)), by hand: error 1 on the left half, 3 on the right."""
    error = torch.cat([torch.ones(1, 4, 8, 4), 3 * torch.ones(1, 4, 8, 4)], 3)

    def customised(noisy, timesteps):
        return base(noisy, timesteps) + error

    regions = torch.zeros(6, 1, 8, 8)
    regions[1, :, :, 4:] = 1  # the right half
    regions[2, :, :, :4] = 1
    regions[3] = 0.5
    regions[4, :, :, 4:] = 0.75
    regions[5, :, 1:, :] = 1
    regions[5, :, 0, 1:] = 1  # one place is left
    found = errors(base, customised, LATENTS, EPS, range(6), regions=regions)
    wanted = torch.tensor([5.0, 1.0, 9.0, 5.0, (1 + 0.25 * 9) / 1.25, 1.0]).double()
    torch.testing.assert_close(found.values, wanted[:, None].expand(6, 10), rtol=1e-5, atol=0)
    assert torch.equal(found.timesteps, errors(base, customised, LATENTS, EPS, range(6)).timesteps)


def test_an_error_depends_on_its_own_sample_alone():
    weight = torch.randn(6, 1, 1, 1, generator=torch.Generator().manual_seed(1))

    def of(rows):
        own = weight[rows]
        return errors(base, lambda x, t: base(x, t) + own * x, LATENTS[rows], EPS, [10 + i for i in rows])

    whole = of([0, 1, 2, 3, 4, 5])
    for rows in ([5, 3, 4, 2, 0, 1], [2], [1, 4]):
        part = of(rows)
        assert torch.equal(part.timesteps, whole.timesteps[rows])
        torch.testing.assert_close(part.values, whole.values[rows], rtol=1e-12, atol=0)


def test_methods_meet_the_same_noise():
    seen = []

    def watch(noisy, timesteps):
        seen.append(noisy.clone())
        return base(noisy, timesteps)

    errors(base, watch, LATENTS, EPS, range(6))
    errors(watch, shifted(1.0), LATENTS, EPS, range(6))
    assert torch.equal(torch.stack(seen[:10]), torch.stack(seen[10:]))


def test_noise_is_normal_and_not_what_the_samples_grew_from():
    seen = []

    def watch(noisy, timesteps):
        seen.append((noisy, timesteps))
        return noisy

    found = errors(watch, base, torch.zeros(40, 4, 8, 8), EPS, range(40), strata=5)
    first = torch.stack([noisy for noisy, _ in seen], 1)  # (40, 5, 4, 8, 8): σ noise
    noise = first / (1 - EPS.alphas_cumprod)[found.timesteps].sqrt().view(40, 5, 1, 1, 1)
    assert abs(noise.mean().item()) < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)
    rows = noise.flatten(2).flatten(0, 1)  # (200, 256), each its own
    started = torch.stack([torch.randn(256, generator=torch.Generator().manual_seed(i)) for i in range(40)])
    everything = torch.cat([rows, started])
    correlation = torch.corrcoef(everything).fill_diagonal_(0)
    assert correlation.abs().max().item() < 0.4  # 256 numbers: 1 / 16 by chance, 0.4 is 6 times that


@pytest.mark.parametrize("strata, span", [(10, 1000), (4, 1000), (7, 1000), (3, 10)])
def test_timesteps_are_stratified(strata, span):
    schedule = Schedule(timesteps=span)
    found = errors(base, base, torch.zeros(300, 1, 1, 1), schedule, range(300), strata=strata)
    edges = torch.arange(strata + 1) * span / strata
    assert ((found.timesteps >= edges[:-1].floor()) & (found.timesteps < edges[1:].ceil())).all()
    assert found.timesteps.unique().numel() > 0.6 * span  # 1 − exp(−1.2) is 0.7
    assert [middle for middle, _ in found.curve()] == pytest.approx([(i + 0.5) * span / strata for i in range(strata)])


@pytest.mark.parametrize("strata", [1, 5, 10])
def test_unbiased_with_an_honest_error(strata):
    """A perturbation t / T has the divergence Σ (t / T)² / T."""
    span = 100
    schedule = Schedule(timesteps=span)
    truth = (torch.arange(span).double() / span).square().mean().item()
    found = errors(base, shifted(lambda t: t / span), torch.zeros(3000, 1, 1, 1), schedule, range(3000), strata=strata)
    whole = found.estimate()
    assert abs(whole.value - truth) < 4 * whole.stderr
    parts = [mean(rows) for rows in found.values.mean(1).view(200, 15)]
    covered = sum(abs(part.value - truth) < 2 * part.stderr for part in parts) / 200
    assert 0.85 < covered < 0.99  # 0.935 for normal values


def test_strata_make_the_error_smaller():
    found = [
        errors(base, shifted(lambda t: t / 1000), torch.zeros(200, 1, 1, 1), EPS, range(200), strata=n) for n in (1, 10)
    ]
    assert found[1].estimate().stderr < 0.1 * found[0].estimate().stderr


def test_curve_is_by_noise_level():
    curve = errors(base, shifted(lambda t: t / 1000), LATENTS, EPS, range(6)).curve()
    assert [middle for middle, _ in curve] == [50.0 + 100 * i for i in range(10)]
    for i, (_, figure) in enumerate(curve):
        assert (i / 10) ** 2 < figure.value < ((i + 1) / 10) ** 2 and figure.n == 6


def test_denoisers_of_the_pipeline(sd):
    """Infusion is exactly the base model where the prompt does not name the concept, and nowhere else."""
    generator = torch.Generator().manual_seed(3)
    widths = {name: layer.heads * layer.dim_head for name, layer in cross_attention_layers(sd.unet).items()}
    tensors = {name: torch.randn(width, generator=generator) for name, width in widths.items()}
    concept = Concept(tensors, "cat", ("a photo of a {}",), sd.architecture)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def of(prompts, templates):
        with Customised(sd, [concept], Settings(scale=1.0)) as customised:
            plain, ours = sd.guided(prompts, scale=1.0), customised(templates)
            return errors(plain, ours, latents, sd.schedule, [0, 1], strata=3)

    assert not of(["a cat", "on a hill"], ["a cat", "on a hill"]).values.any()
    named = of(["a cat", "on a hill"], ["a {}", "on a hill"]).values
    assert (named[0] > 0).all() and not named[1].any()


def test_an_image_that_is_region_everywhere_is_named():
    regions = torch.zeros(6, 1, 8, 8)
    regions[2] = 1
    with pytest.raises(UserError, match="image 2 is region everywhere"):
        errors(base, base, LATENTS, EPS, range(6), regions=regions)
