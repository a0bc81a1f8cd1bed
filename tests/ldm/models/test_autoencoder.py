from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import nn

from ldm.models.autoencoder import AutoencoderKL, Downsample

MANIFEST = Path(__file__).parents[1] / "manifests" / "VAE-v1-SD.txt"
SMALL = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1)


def small(**options) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(**{**SMALL, **options})
    for parameter in vae.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return vae.requires_grad_(False)


def pictures(batch: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_tensors_are_those_of_the_published_checkpoint():
    with torch.device("meta"):
        vae = AutoencoderKL()
    ours = {name: "[" + ",".join(map(str, t.shape)) + "]" for name, t in vae.state_dict().items()}
    assert ours == dict(line.split(" ") for line in MANIFEST.read_text().splitlines())
    assert vae.factor == 8


def test_group_norm_epsilons():
    assert {m.eps for m in small().modules() if isinstance(m, nn.GroupNorm)} == {1e-6}


def test_without_attention_only_the_attention_is_gone():
    full, plain = set(small().state_dict()), set(small(mid_attention=False).state_dict())
    assert plain < full
    assert len(full - plain) == 20  # two blocks of norm, q, k, v, proj_out with weight and bias
    assert all(".mid.attn_1." in name for name in full - plain)


@pytest.mark.parametrize("options", [{}, {"mid_attention": False}, {"embed_dim": 3, "ch_mult": (1, 1, 2)}])
def test_shapes(options):
    vae = small(**options)
    side = 16 // vae.factor
    latents = vae.encode(pictures())
    assert latents.shape == (2, vae.embed_dim, side, side)
    assert vae.decode(latents).shape == (2, 3, 16, 16)


def test_narrow_widths():
    vae = small(ch=48, ch_mult=(1, 2, 3), mid_attention=False)
    assert vae.decode(vae.encode(pictures())).isfinite().all()


def test_downsampling_pads_right_and_bottom_only():
    layer = Downsample(1)
    nn.init.zeros_(layer.conv.bias)
    for corner, seen in (((0, 0), [[0.0, 2.0], [8.0, 10.0]]), ((2, 2), [[10.0, 0.0], [0.0, 0.0]])):
        nn.init.zeros_(layer.conv.weight)
        layer.conv.weight.data[0, 0, *corner] = 1.0  # the convolution picks one pixel of each 3×3 window
        assert layer(torch.arange(16.0).view(1, 1, 4, 4))[0, 0].tolist() == seen


def test_encode_is_the_scaled_mean_and_decode_undoes_the_scale():
    one, two = small(scale_factor=1.0), small(scale_factor=2.0)
    mean, _ = one.moments(pictures())
    assert torch.equal(one.encode(pictures()), mean)
    assert torch.equal(two.encode(pictures()), 2.0 * mean)
    assert torch.equal(two.decode(2.0 * mean), one.decode(mean))


def test_sampling_is_mean_plus_deviation_times_the_generators_noise():
    vae = small()
    mean, logvar = vae.moments(pictures())
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    latents = vae.encode(pictures(), sample=True, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(latents, vae.scale_factor * (mean + (logvar / 2).exp() * noise))


def test_log_variance_is_clamped():
    vae = small()
    nn.init.constant_(vae.quant_conv.bias, 1e3)
    assert vae.moments(pictures())[1].unique().tolist() == [20.0]
    nn.init.constant_(vae.quant_conv.bias, -1e3)
    assert vae.moments(pictures())[1].unique().tolist() == [-30.0]


def test_sides_must_divide():
    with pytest.raises(ValueError, match="divisible by 2"):
        small().encode(torch.zeros(1, 3, 16, 15))


def test_rows_do_not_depend_on_the_batch():
    vae, images = small(), pictures(3)
    rows = torch.cat([vae.decode(vae.encode(image[None])) for image in images])
    torch.testing.assert_close(vae.decode(vae.encode(images)), rows, atol=1e-4, rtol=1e-4)


def test_bfloat16():
    vae = small()
    latents = vae.encode(pictures())
    exact = vae.decode(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = vae.decode(latents)
    half = vae.bfloat16().decode(latents.bfloat16())
    for out in (mixed, half):
        assert out.dtype == torch.bfloat16
        assert (out - exact).norm() < 0.05 * exact.norm()


def test_compiles_to_one_graph():
    vae = small()
    encode = torch.compile(vae.encoder, backend="eager", fullgraph=True)
    decode = torch.compile(vae.decoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(encode(pictures()), vae.encoder(pictures()))
    z = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(decode(z), vae.decoder(z))


def test_equals_diffusers():
    vae = small(ch_mult=(1, 2, 2), num_res_blocks=2)
    peer = diffusers.AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
    )
    prefixed = {f"first_stage_model.{name}": t for name, t in vae.state_dict().items()}
    peer.load_state_dict(convert_ldm_vae_checkpoint(prefixed, peer.config))
    mean, logvar = vae.moments(pictures())
    with torch.no_grad():
        theirs = peer.encode(pictures()).latent_dist
        assert mean.std() > 0.1
        torch.testing.assert_close(mean, theirs.mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logvar, theirs.logvar, atol=1e-4, rtol=1e-4)
        decoded = peer.decode(mean).sample
    torch.testing.assert_close(vae.decode(mean * vae.scale_factor), decoded, atol=1e-4, rtol=1e-4)
