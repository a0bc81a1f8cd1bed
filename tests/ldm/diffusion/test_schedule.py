import diffusers
import pytest
import torch

from ldm.diffusion.schedule import SAMPLERS, Schedule


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 5, 5, generator=generator)
    return latents, noise, torch.tensor([0, 500, 999])


def test_betas_are_linear_in_their_roots():
    alphas = Schedule().alphas_cumprod
    assert alphas.shape == (1000,) and alphas.dtype == torch.float32
    assert alphas[0].item() == pytest.approx(1 - 0.00085)
    betas = 1 - alphas.double()[1:] / alphas.double()[:-1]
    assert betas[-1].item() == pytest.approx(0.012, rel=1e-4)
    assert betas[499].item() == pytest.approx(((0.00085**0.5) * 499 / 999 + (0.012**0.5) * 500 / 999) ** 2, rel=1e-4)
    assert alphas[999].item() == pytest.approx(0.00466, abs=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_targets_agree_with_diffusers(kind):
    schedule, peer = Schedule(prediction_type=kind), Schedule().scheduler()
    latents, noise, timesteps = example()
    torch.testing.assert_close(schedule.add_noise(latents, noise, timesteps), peer.add_noise(latents, noise, timesteps))
    target = noise if kind == "epsilon" else peer.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(schedule.target(latents, noise, timesteps), target)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timesteps", [torch.tensor([1, 500, 999]), torch.tensor(700)])
def test_a_perfect_prediction_gives_back_the_noise(kind, timesteps):
    schedule = Schedule(prediction_type=kind)
    latents, noise, _ = example()
    noisy = schedule.add_noise(latents, noise, timesteps)
    prediction = schedule.target(latents, noise, timesteps)
    torch.testing.assert_close(schedule.to_epsilon(prediction, noisy, timesteps), noise, atol=1e-5, rtol=1e-5)


def test_half_precision_stays_half():
    latents, noise, timesteps = example()
    noisy = Schedule().add_noise(latents.half(), noise.half(), timesteps)
    assert noisy.dtype == torch.float16
    torch.testing.assert_close(noisy.float(), Schedule().add_noise(latents, noise, timesteps), atol=5e-3, rtol=0)


def test_the_schedule_is_real_on_the_meta_device():
    with torch.device("meta"):
        schedule = Schedule()
    assert torch.equal(schedule.alphas_cumprod, Schedule().alphas_cumprod)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_every_scheduler_has_this_schedule(name, kind):
    scheduler = Schedule(prediction_type=kind).scheduler(name)
    torch.testing.assert_close(scheduler.alphas_cumprod, Schedule().alphas_cumprod, atol=1e-6, rtol=1e-4)
    assert scheduler.config.prediction_type == kind
    scheduler.set_timesteps(50)
    assert torch.equal(scheduler.timesteps, scheduler.timesteps.round())  # the UNet was trained on whole timesteps


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_a"])
def test_timesteps_are_those_of_ldm(name):
    scheduler = Schedule().scheduler(name)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))


def test_a_scheduler_is_fresh():
    schedule = Schedule()
    assert isinstance(schedule.scheduler(), diffusers.DDIMScheduler)
    assert schedule.scheduler() is not schedule.scheduler()


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="unknown sampler 'dimm': choose one of ddim, plms"):
        Schedule().scheduler("dimm")
    with pytest.raises(ValueError, match="schedule"):
        Schedule(beta_start=0.02, beta_end=0.01)
