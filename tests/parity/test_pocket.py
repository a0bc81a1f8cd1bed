"""Pocket as a diffusers folder, drawn by diffusers alone: the same image."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from ldm.diffusers_export import export_diffusers
from ldm.pipeline import StableDiffusion
from ldm.sampler import initial_noise

pytestmark = pytest.mark.slow

PROMPTS, NEGATIVE = ["a photo of a red teapot on grass", "a cartoon of a cat in the night sky on the left"], "a dog"


@torch.no_grad()
def test_the_exported_model_draws_the_same(configs, agree, tmp_path):
    sd = StableDiffusion.from_checkpoint(configs / "pocket.yaml")
    export_diffusers(sd, tmp_path / "pocket")
    images = sd.sample(PROMPTS, steps=10, scale=5.0, seed=3, negative_prompt=NEGATIVE)

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pocket", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise([3, 4], sd.latent_shape())
    reference = pipeline(
        PROMPTS, negative_prompt=[NEGATIVE] * 2, latents=noise, num_inference_steps=10, guidance_scale=5.0,
        height=sd.image_size, width=sd.image_size, output_type="pt",
    )  # fmt: skip
    agree(images, reference.images)
