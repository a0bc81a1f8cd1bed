"""Pocket as a diffusers folder, drawn by diffusers alone: the same images, by every sampler."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ldm.diffusion.sampler import initial_noise
from ldm.diffusion.schedule import SAMPLERS, Schedule
from ldm.pipeline import StableDiffusion
from ldm.weights.export import export_diffusers

pytestmark = pytest.mark.slow

PROMPTS, NEGATIVE = ["a photo of a red teapot on grass", "a cartoon of a cat in the night sky on the left"], "a dog"


@pytest.fixture(scope="module")
def sd(configs) -> StableDiffusion:
    return StableDiffusion.from_checkpoint(configs / "pocket.yaml")


@pytest.fixture(scope="module")
def pipeline(sd, tmp_path_factory) -> StableDiffusionPipeline:
    folder = tmp_path_factory.mktemp("exported") / "pocket"
    export_diffusers(sd, folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CASES = [(name, 0.0, "epsilon") for name in SAMPLERS]
CASES += [("ddim", 0.6, "epsilon"), ("ddim", 0.6, "v_prediction"), ("dpmpp_2m", 0.0, "v_prediction")]


@pytest.mark.parametrize(("sampler", "eta", "kind"), CASES)
@torch.no_grad()
def test_every_sampler_draws_what_diffusers_draws(sd, pipeline, monkeypatch, agree, sampler, eta, kind):
    """Seven steps, which do not divide a thousand; noise of each image from its own generator."""
    monkeypatch.setattr(sd, "schedule", Schedule(prediction_type=kind))  # what it predicts is read either way
    images = sd.sample(PROMPTS, steps=7, scale=5.0, seed=3, negative_prompt=NEGATIVE, sampler=sampler, eta=eta)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    noise = initial_noise(generators, sd.latent_shape())
    monkeypatch.setattr(pipeline, "scheduler", sd.schedule.scheduler(sampler))
    reference = pipeline(
        PROMPTS, negative_prompt=[NEGATIVE] * 2, latents=noise, generator=generators, eta=eta, num_inference_steps=7,
        guidance_scale=5.0, height=sd.image_size, width=sd.image_size, output_type="pt",
    )  # fmt: skip
    agree(images, reference.images)


@torch.no_grad()
def test_the_exported_scheduler_is_that_of_the_default_sampler(sd, pipeline, agree):
    images = sd.sample(PROMPTS, steps=10, scale=5.0, seed=3)
    noise = initial_noise([3, 4], sd.latent_shape())
    reference = pipeline(PROMPTS, latents=noise, num_inference_steps=10, guidance_scale=5.0, height=64, width=64,
                         output_type="pt")  # fmt: skip
    agree(images, reference.images)
