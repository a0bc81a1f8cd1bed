import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.diffusion.sampler import Guided, initial_noise, sample
from ldm.diffusion.schedule import SAMPLERS, Schedule
from ldm.models.attention import Context

NOISY = [("ddim", 1.0), ("euler_a", 0.0)]
SHAPE = (4, 3, 3)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class Gaussian:
    """The exact denoiser for data from N(mean, std²) in every element."""

    mean, std = 0.5, 0.3

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        assert timestep.dtype == torch.int64 and timestep.shape == ()
        alpha = self.schedule.alphas_cumprod[timestep]
        noise = (1 - alpha).sqrt() * (latents - alpha.sqrt() * self.mean) / (alpha * self.std**2 + 1 - alpha)
        clean = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        return self.schedule.target(clean, noise, timestep)

    def flow(self, latents: Tensor, start: int) -> Tensor:
        """Where the probability-flow ODE takes noise: the marginal's standard score does not change along it."""
        alpha = self.schedule.alphas_cumprod[start]
        score = (latents - alpha.sqrt() * self.mean) / (alpha * self.std**2 + 1 - alpha).sqrt()
        return self.mean + self.std * score


def test_ddim_is_that_of_ldm():
    """50 steps against LDM's own recurrence, written out, eta 0 (Song et al. 2020, eq. 12)."""

    def model(x: np.ndarray, t: int) -> np.ndarray:
        return np.tanh(0.8 * x + np.sin(t / 100))

    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    timesteps = np.arange(0, 1000, 20) + 1
    previous = np.concatenate([alphas[:1], alphas[timesteps[:-1]]])
    noise = initial_noise([0], SHAPE)
    x = noise.double().numpy()
    for t, a, a_prev in zip(timesteps[::-1], alphas[timesteps][::-1], previous[::-1], strict=True):
        e = model(x, t)
        x = np.sqrt(a_prev) * (x - np.sqrt(1 - a) * e) / np.sqrt(a) + np.sqrt(1 - a_prev) * e

    def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
        return torch.from_numpy(model(latents.double().numpy(), timestep.item()))

    ours = sample(denoise, Schedule().scheduler("ddim"), noise, 50)
    assert np.abs(ours.numpy() - x).max() < 3e-5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "plms", "euler", "dpmpp_2m", "unipc"])
def test_deterministic_samplers_follow_the_flow(name, kind):
    schedule = Schedule(prediction_type=kind)
    denoise, noise = Gaussian(schedule), initial_noise(range(8), SHAPE)
    for steps, error in ((50, 0.09), (200, 0.025)):
        scheduler = schedule.scheduler(name)
        latents = sample(denoise, scheduler, noise, steps)
        flow = denoise.flow(noise, int(scheduler.timesteps[0]))
        assert (latents - flow).abs().max() < error


@pytest.mark.parametrize("name, eta", NOISY)
def test_noisy_samplers_draw_from_the_data(name, eta):
    schedule = Schedule()
    noise = initial_noise([0], (4, 40, 40))
    latents = sample(Gaussian(schedule), schedule.scheduler(name), noise, 200, eta, generators(1))
    assert latents.mean().item() == pytest.approx(0.5, abs=0.02)
    assert latents.std().item() == pytest.approx(0.3, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([latents.flatten(), noise.flatten()]))[0, 1]) < 0.2


@pytest.mark.parametrize("name, eta", [*((name, 0.0) for name in SAMPLERS), ("ddim", 0.7)])
def test_an_image_does_not_depend_on_its_batch(name, eta):
    schedule = Schedule()

    def draw(*seeds: int) -> Tensor:
        rows = generators(*seeds)
        return sample(Gaussian(schedule), schedule.scheduler(name), initial_noise(rows, SHAPE), 7, eta, rows)

    together = draw(3, 4, 5)
    assert torch.equal(together, torch.cat([draw(3), draw(4), draw(5)]))
    assert torch.equal(together.flip(0), draw(5, 4, 3))
    assert (together[0] - together[1]).abs().max() > 0.01


def test_initial_noise_has_a_generator_per_image():
    noise = initial_noise([7, 8], SHAPE)
    assert noise.shape == (2, *SHAPE) and noise.dtype == torch.float32
    assert torch.equal(noise[1], torch.randn(SHAPE, generator=torch.Generator().manual_seed(8)))
    rows = generators(7, 8)
    assert torch.equal(initial_noise(rows, SHAPE), noise)
    assert not torch.equal(initial_noise(rows, SHAPE), noise)  # they went on: no noise comes twice


def test_latents_stay_float32_under_a_half_precision_model():
    def denoise(latents: Tensor, timestep: Tensor) -> Tensor:
        assert latents.dtype == torch.float32
        return latents.half()

    for name in SAMPLERS:
        assert sample(denoise, Schedule().scheduler(name), initial_noise([0], SHAPE), 3).dtype == torch.float32


class Sum(torch.nn.Module):
    """Latents times the text's sum, plus the timestep; keeps the batch sizes that it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, latents: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        assert latents.dtype == context.text.dtype and timesteps.shape == (len(latents),)
        self.rows.append(len(latents))
        factors, added = (row[:, None, None, None].to(latents.dtype) for row in (context.text.sum((1, 2)), timesteps))
        return latents * factors + added


def test_guidance_goes_past_the_prompt_away_from_the_negative():
    unet, latents, t = Sum(), torch.ones(2, *SHAPE), torch.tensor(5)
    text, negative = (Context(torch.tensor(values).view(-1, 1, 1)) for values in ([3.0, 4.0], [1.0]))
    guided = Guided(unet, text, negative, 2.0)(latents, t)
    assert guided[:, 0, 0, 0].tolist() == [6 + 2 * (8 - 6), 6 + 2 * (9 - 6)]
    assert torch.equal(Guided(unet, text, negative, 1.0)(latents, t)[:, 0, 0, 0], torch.tensor([8.0, 9.0]))
    assert unet.rows == [4, 2]  # without guidance nothing is computed for the negative prompt
    half = Guided(unet, text.to("cpu", torch.half), negative.to("cpu", torch.half), 2.0)(latents, t)
    assert half.dtype == torch.float32 and torch.equal(half, guided)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ddim", {"steps": 0}, "steps: must be from 1 to 999"),
        ("ddim", {"steps": 1000}, "steps: must be from 1 to 999"),
        ("ddim", {"eta": 1.5}, "eta"),
        ("euler", {"eta": 0.5}, "only the ddim sampler"),
        ("ddim", {"generators": generators(1)}, "1 generators for 2 images"),
    ],
)
def test_mistakes_are_refused(name, options, message):
    schedule = Schedule()
    with pytest.raises(ValueError, match=message):
        sample(Gaussian(schedule), schedule.scheduler(name), initial_noise([0, 1], SHAPE), **{"steps": 5, **options})
