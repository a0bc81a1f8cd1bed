import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("architecture", ["sd15"])  # SD 2.x has the same autoencoder
@torch.no_grad()
def test_encoding_and_decoding_are_those_of_diffusers(ours, peer, checkpoint, agree):
    vae, reference = ours("vae"), peer.load_vae(checkpoint)
    images = torch.rand(1, 3, 192, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = reference.encode(images).latent_dist.mean * reference.config.scaling_factor
    agree(vae.encode(images), latents)
    agree(vae.decode(latents), reference.decode(latents / reference.config.scaling_factor).sample)
