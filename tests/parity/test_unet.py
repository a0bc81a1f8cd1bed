import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("architecture", ["sd15", "sd21_768"])
@torch.no_grad()
def test_predictions_are_those_of_diffusers(ours, peer, checkpoint, agree):
    generator = torch.Generator().manual_seed(0)
    unet = ours("unet")
    text = torch.randn(2, 77, unet.context_dim, generator=generator)
    timesteps = torch.tensor([981, 3])
    reference = peer.load_unet(checkpoint)
    assert bool(reference.config.upcast_attention) is bool(peer.upcast)
    for height, width in ((16, 16), (16, 24)):
        latents = torch.randn(2, 4, height, width, generator=generator)
        agree(unet(latents, timesteps, text), reference(latents, timesteps, text).sample)
