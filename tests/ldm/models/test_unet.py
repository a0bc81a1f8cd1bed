from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn

from ldm.models.attention import Context, CrossAttention, SpatialTransformer
from ldm.models.unet import ResBlock, UNet, size_embedding, timestep_embedding

MANIFESTS = Path(__file__).parents[1] / "manifests"
SD15 = dict(num_heads=8, context_dim=768)
SD21 = dict(num_head_channels=64, context_dim=1024, use_linear=True)
SMALL = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), context_dim=24)


def manifest(name: str) -> dict[str, str]:
    return dict(line.split(" ") for line in (MANIFESTS / f"{name}.txt").read_text().splitlines())


def shapes(model: nn.Module) -> dict[str, str]:
    return {name: "[" + ",".join(map(str, t.shape)) + "]" for name, t in model.state_dict().items()}


def small(**options) -> UNet:
    """A UNet without a zero in it: what starts at zero would hide whatever comes before it."""
    torch.manual_seed(0)
    heads = {} if "num_head_channels" in options else {"num_heads": 4}
    unet = UNet(**{**SMALL, **heads, **options})
    for parameter in unet.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return unet


def inputs(batch: int = 2, size: int = 8):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, size, size, generator=generator)
    return latents, torch.arange(batch) * 300 + 7, torch.randn(batch, 6, 24, generator=generator)


@pytest.mark.parametrize(
    "name, options, parameters", [("UNET-v1-SD", SD15, 859_520_964), ("UNET-v2-SD", SD21, 865_910_724)]
)
def test_tensors_are_those_of_the_published_checkpoint(name, options, parameters):
    with torch.device("meta"):
        unet = UNet(**options)
    assert shapes(unet) == manifest(name)
    assert sum(p.numel() for p in unet.parameters()) == parameters


@pytest.mark.parametrize("options, heads", [(SD15, {8}), (SD21, {5, 10, 20})])
def test_sixteen_cross_attention_layers_of_the_published_widths(options, heads):
    with torch.device("meta"):
        unet = UNet(**options)
    layers = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    widths = sorted(layer.to_v.out_features for layer in layers)
    assert widths == [320] * 5 + [640] * 5 + [1280] * 6
    assert {layer.heads for layer in layers} == heads
    assert all(layer.heads * layer.dim_head == layer.to_v.out_features for layer in layers)


def test_group_norm_epsilons():
    norms = {name: m.eps for name, m in small().named_modules() if isinstance(m, nn.GroupNorm)}
    assert {eps for name, eps in norms.items() if name.endswith(".norm")} == {1e-6}  # SpatialTransformer.norm
    assert {eps for name, eps in norms.items() if not name.endswith(".norm")} == {1e-5}


def test_upcast_reaches_every_attention_layer():
    for upcast in (False, True):
        layers = [m for m in small(upcast_attention=upcast).modules() if isinstance(m, CrossAttention)]
        assert len(layers) == 8
        assert all(layer.upcast is upcast for layer in layers)


def test_timestep_embedding_has_cosines_first():
    out = timestep_embedding(torch.tensor([0, 500]), 4)
    angle = torch.tensor([500.0, 500.0 / 10000**0.5])
    torch.testing.assert_close(out[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(out[1], torch.cat([angle.cos(), angle.sin()]), atol=1e-4, rtol=0)
    assert out.dtype == torch.float32


def test_a_new_unet_predicts_zero():
    latents, timesteps, text = inputs()
    assert torch.equal(UNet(**SMALL, num_heads=4)(latents, timesteps, text), torch.zeros_like(latents))


def test_a_new_residual_block_is_its_skip_connection():
    x, time = torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    assert torch.equal(ResBlock(32, 16, 32)(x, time), x)
    block = ResBlock(32, 16, 64)
    assert torch.equal(block(x, time), block.skip_connection(x))


def test_every_input_matters():
    unet, (latents, timesteps, text) = small(), inputs()
    out = unet(latents, timesteps, text)
    assert out.shape == latents.shape
    for changed in ((latents + 1, timesteps, text), (latents, timesteps + 50, text), (latents, timesteps, text + 1)):
        assert (unet(*changed) - out).abs().max() > 1e-2


def test_plain_tensor_is_a_context():
    unet, (latents, timesteps, text) = small(), inputs()
    assert torch.equal(unet(latents, timesteps, text), unet(latents, timesteps, Context(text)))


def test_context_reaches_every_cross_attention_as_it_is():
    @dataclass(frozen=True)
    class Tagged(Context):
        tag: str

    class Spy(CrossAttention):
        def forward(self, x, context=None):
            seen.append(context)
            return super().forward(x, context)

    seen: list = []
    unet, (latents, timesteps, text) = small(), inputs()
    plain = unet(latents, timesteps, text)
    for name, layer in unet.named_modules():
        if name.endswith("attn2"):
            layer.__class__ = Spy
    context = Tagged(text, "kept")
    assert torch.equal(unet(latents, timesteps, context), plain)
    assert len(seen) == 4  # one on the way down, one in the middle, two on the way up
    assert all(c is context for c in seen)


def test_checkpointing_changes_neither_values_nor_gradients():
    unet, (latents, timesteps, text) = small(), inputs()
    results = []
    for checkpoint in (False, True):
        unet.checkpoint = checkpoint
        unet.zero_grad()
        leaf = text.clone().requires_grad_()
        out = unet(latents, timesteps, Context(leaf))
        out.square().mean().backward()
        results.append((out.detach(), leaf.grad, {name: p.grad.clone() for name, p in unet.named_parameters()}))
    (out, text_grad, grads), (out_c, text_grad_c, grads_c) = results
    assert torch.equal(out, out_c)
    assert text_grad.abs().max() > 0
    torch.testing.assert_close(text_grad_c, text_grad)
    torch.testing.assert_close(grads_c, grads)


def test_checkpointing_keeps_gradients_that_reach_a_frozen_unet_only_through_the_context():
    unet, (latents, timesteps, text) = small().requires_grad_(False), inputs()
    gradients = []
    for checkpoint in (False, True):
        unet.checkpoint = checkpoint
        leaf = text.clone().requires_grad_()
        unet(latents, timesteps, Context(leaf)).sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_checkpointing_stores_less():
    unet, (latents, timesteps, text) = small(), inputs()
    stored = []
    for checkpoint in (False, True):
        unet.checkpoint = checkpoint
        sizes: list[int] = []

        def pack(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            unet(latents, timesteps, text)
        stored.append(sum(sizes))
    assert stored[1] < 0.5 * stored[0]


def test_rows_do_not_depend_on_the_batch():
    unet, (latents, timesteps, text) = small(), inputs(batch=3)
    rows = [unet(latents[i : i + 1], timesteps[i : i + 1], text[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(unet(latents, timesteps, text), torch.cat(rows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("upcast", [False, True])
def test_bfloat16(upcast):
    unet, (latents, timesteps, text) = small(upcast_attention=upcast), inputs()
    with torch.no_grad():
        exact = unet(latents, timesteps, text)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = unet(latents, timesteps, text)
        half = unet.bfloat16()(latents.bfloat16(), timesteps, text.bfloat16())
    for out in (mixed, half):
        assert out.dtype == torch.bfloat16
        assert (out - exact).norm() < 0.05 * exact.norm()


def test_compiles_to_one_graph():
    unet, (latents, timesteps, text) = small(), inputs()
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    for context in (text, Context(text)):
        torch.testing.assert_close(compiled(latents, timesteps, context), unet(latents, timesteps, context))


def test_sides_must_divide():
    _, timesteps, text = inputs()
    with pytest.raises(ValueError, match="divisible by 2"):
        small()(torch.zeros(2, 4, 8, 7), timesteps, text)


@pytest.mark.parametrize(
    "heads",
    [{}, {"num_heads": 4, "num_head_channels": 8}, {"num_heads": -1}, {"num_heads": 5}, {"num_head_channels": 24}],
)
def test_heads_must_be_given_once_and_divide(heads):
    with pytest.raises(ValueError, match="heads"):
        UNet(**SMALL, **heads)


@pytest.mark.parametrize("version", [1, 2])
def test_equals_diffusers(version):
    options = dict(channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(1, 2), transformer_depth=1)
    if version == 1:
        unet = small(**options)
    else:
        unet = small(**options, num_head_channels=16, use_linear=True, upcast_attention=True)
    config = dict(
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=4 if version == 1 else (2, 4, 4),  # a number of heads, whatever its name
        use_linear_projection=version == 2,
        upcast_attention=version == 2,
    )
    peer = UNet2DConditionModel(**config).eval()
    prefixed = {f"model.diffusion_model.{name}": t for name, t in unet.state_dict().items()}
    peer.load_state_dict(convert_ldm_unet_checkpoint(prefixed, peer.config))
    latents, timesteps, text = inputs()
    with torch.no_grad():
        ours, theirs = unet(latents, timesteps, text), peer(latents, timesteps, text).sample
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_pooled_vector_and_sizes_condition_the_time_embedding():
    options = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 2, "context_dim": 8}
    torch.manual_seed(0)
    unet = UNet(attention_resolutions=(1,), pooled_dim=6, **options)
    nn.init.normal_(unet.out[2].weight)
    for module in unet.modules():
        if isinstance(module, ResBlock):
            nn.init.normal_(module.out_layers[3].weight, std=0.1)
    latents, timesteps, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 8)
    pooled = torch.randn(2, 6)
    first, other = (unet(latents, timesteps, Context(text, pooled=rows)) for rows in (pooled, torch.randn(2, 6)))
    assert not torch.allclose(first, other)
    whole, cropped = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2), torch.tensor([[64, 64, 0, 7, 64, 64]] * 2)
    assert torch.equal(first, unet(latents, timesteps, Context(text, pooled=pooled, sizes=whole)))  # 8 pixels a latent
    assert not torch.allclose(first, unet(latents, timesteps, Context(text, pooled=pooled, sizes=cropped)))
    nn.init.zeros_(unet.label_emb[0][2].weight)
    nn.init.zeros_(unet.label_emb[0][2].bias)
    without = UNet(attention_resolutions=(1,), **options)
    without.load_state_dict({name: t for name, t in unet.state_dict().items() if not name.startswith("label_emb")})
    same = unet(latents, timesteps, Context(text, pooled=torch.randn(2, 6)))
    assert torch.equal(same, without(latents, timesteps, text))
    with pytest.raises(ValueError, match="the context has no pooled vector"):
        unet(latents, timesteps, text)
    with pytest.raises(ValueError, match="the context has a pooled vector"):
        without(latents, timesteps, Context(text, pooled=torch.randn(2, 6)))


def test_sizes_are_embedded_as_exact_integers_one_after_the_other():
    sizes = torch.tensor([[1023, 1024, 3, 0, 768, 1]])
    expected = torch.cat([timestep_embedding(torch.tensor([size]), 256) for size in sizes[0]], dim=1)
    assert torch.equal(size_embedding(sizes), expected) and expected.shape == (1, 1536)
    unet = UNet(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, num_heads=2, context_dim=8, pooled_dim=4)
    seen = []
    unet.label_emb.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    context = Context(torch.randn(1, 5, 8), pooled=torch.randn(1, 4), sizes=sizes).to("cpu", torch.bfloat16)
    unet.to(torch.bfloat16)(torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor([3]), context)
    assert torch.equal(seen[0], torch.cat([context.pooled, expected.bfloat16()], dim=1))


def test_each_level_has_its_own_depth_and_the_middle_the_last():
    options = {"model_channels": 32, "num_res_blocks": 1, "num_heads": 2, "context_dim": 8}
    unet = UNet(channel_mult=(1, 2, 2), attention_resolutions=(2, 4), transformer_depth=[0, 1, 3], **options)
    depths = {n: len(m.transformer_blocks) for n, m in unet.named_modules() if isinstance(m, SpatialTransformer)}
    blocks = {"input_blocks": {3: 1, 5: 3}, "output_blocks": {0: 3, 1: 3, 2: 1, 3: 1}}
    expected = {f"{side}.{i}.1": depth for side, own in blocks.items() for i, depth in own.items()}
    assert depths == expected | {"middle_block.1": 3}
    with pytest.raises(ValueError, match="transformer_depth: 2 numbers for 3 levels"):
        UNet(channel_mult=(1, 2, 2), transformer_depth=[1, 2], **options)
