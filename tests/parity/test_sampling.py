import pytest
import torch
from diffusers import StableDiffusionPipeline

from ldm.diffusion.sampler import initial_noise
from ldm.pipeline import StableDiffusion

pytestmark = pytest.mark.slow

PROMPT, NEGATIVE = "a photo of a cat", "blurry"


@pytest.mark.parametrize("architecture", ["sd15", "sd21_768"])
@torch.no_grad()
def test_ten_guided_steps_are_those_of_diffusers(architecture, configs, checkpoint, peer, agree, tmp_path):
    """Text to image through the whole of each library, on a size that is not square."""
    sd = StableDiffusion.from_checkpoint(configs / f"{architecture}.yaml", checkpoint)
    size = dict(height=192, width=256)
    image = sd.sample([PROMPT], steps=10, scale=7.5, seed=3, negative_prompt=NEGATIVE, **size)
    noise = initial_noise([3], sd.latent_shape(**size))
    tokenizer = sd.text.tokenizer
    del sd

    text = peer.load_text(checkpoint, tmp_path)
    prompt, negative = text(tokenizer([PROMPT, NEGATIVE])).last_hidden_state.split(1)
    parts = dict(vae=peer.load_vae(checkpoint), text_encoder=text, tokenizer=None, unet=peer.load_unet(checkpoint))
    nothing = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline = StableDiffusionPipeline(**parts, **nothing, scheduler=peer.scheduler())
    pipeline.set_progress_bar_config(disable=True)
    reference = pipeline(
        prompt_embeds=prompt, negative_prompt_embeds=negative, latents=noise, num_inference_steps=10,
        guidance_scale=7.5, output_type="pt", **size,
    )  # fmt: skip
    agree(image, reference.images)
