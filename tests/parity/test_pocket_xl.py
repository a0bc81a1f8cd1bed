"""SDXL at pocket size with random weights, and diffusers' and transformers' classes with the same ones."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from ldm.diffusion.sampler import initial_noise
from ldm.models.attention import Context
from ldm.pipeline import StableDiffusion
from ldm.weights.checkpoint import save
from ldm.weights.export import export_diffusers
from tests.parity import sdxl_full_size

PROMPTS, NEGATIVE = ["a photo of a cat", "two dogs on a hill"], "blurry"


@pytest.fixture(scope="module")
def config(configs) -> Path:
    return configs / "pocket_xl.yaml"


@pytest.fixture(scope="module")
def sd(config) -> StableDiffusion:
    torch.manual_seed(0)
    sd = StableDiffusion.from_config(config).requires_grad_(False)
    for parameter in sd.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return sd


@pytest.fixture(scope="module")
def folder(sd, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "pocket_xl"
    export_diffusers(sd, folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def test_text_and_pooled_vector_are_theirs(sd, pipeline, agree):
    context = sd.text.context(sd.text.tokenizer(PROMPTS))
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    agree(context.text, text)
    agree(context.pooled, pooled)


@torch.no_grad()
def test_predictions_are_theirs_at_two_sizes_and_with_any_crop(sd, pipeline, agree):
    generator = torch.Generator().manual_seed(0)
    context = sd.text.context(sd.text.tokenizer(PROMPTS))
    timesteps = torch.tensor([981, 3])
    for height, width in ((16, 16), (12, 20)):
        latents = torch.randn(2, 4, height, width, generator=generator)
        whole = torch.tensor([[4 * height, 4 * width, 0, 0, 4 * height, 4 * width]] * 2)
        cropped = torch.tensor([[1023, 769, 5, 0, 64, 48], [300, 3001, 0, 17, 64, 64]])
        for given, sizes in ((context, whole), (Context(context.text, pooled=context.pooled, sizes=cropped), cropped)):
            added = {"text_embeds": context.pooled, "time_ids": sizes.float()}
            theirs = pipeline.unet(latents, timesteps, context.text, added_cond_kwargs=added).sample
            agree(sd.unet(latents, timesteps, given), theirs)


@torch.no_grad()
def test_the_autoencoder_is_theirs(sd, pipeline, agree):
    images = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
    agree(sd.vae.encode(images), latents)
    agree(sd.vae.decode(latents), pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample)


@pytest.mark.parametrize("negative, theirs", [("", None), (NEGATIVE, NEGATIVE), (" ", "")])
@torch.no_grad()
def test_ten_guided_steps_are_theirs(sd, pipeline, agree, negative, theirs):
    """diffusers has zeros for no negative prompt and encodes an empty one, which here is a space."""
    size = {"height": 48, "width": 64}
    images = sd.sample(PROMPTS, steps=10, scale=5.0, seed=3, negative_prompt=negative, **size)
    noise = initial_noise([3, 4], sd.latent_shape(**size))
    reference = pipeline(
        PROMPTS, negative_prompt=None if theirs is None else [theirs] * 2, latents=noise, num_inference_steps=10,
        guidance_scale=5.0, output_type="pt", **size,
    )  # fmt: skip
    agree(images, reference.images)


def test_folder_and_file_hold_the_same_model(sd, folder, config, tmp_path):
    file = tmp_path / "pocket_xl.safetensors"
    save(file, dict(sd.named_children()), sd.architecture, torch.float32)
    whole = sd.state_dict()
    for source in (folder, file):
        back = StableDiffusion.from_checkpoint(config, source).state_dict()
        different = [name for name, tensor in back.items() if not torch.equal(tensor, whole[name])]
        assert different == (["text.embedders.1.model.logit_scale"] if source == folder else [])


def test_the_comparison_at_full_size_is_rehearsed(config, capsys):
    """The script that needs 16 GiB, on the small model: every part of it runs, within its bound."""
    sdxl_full_size.main(["--config", str(config)])
    found = capsys.readouterr().out
    parts = ("text", "pooled vector", "UNet, latents 24 × 40", "autoencoder, decoding", "ten guided steps")
    assert all(f"{part}: " in found for part in parts)
    assert "optimiser step 2: loss" in found and "11 of 11 residuals moved, 704 parameters" in found
