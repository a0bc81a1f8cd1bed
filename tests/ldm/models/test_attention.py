import dataclasses

import pytest
import torch

from ldm.models.attention import GEGLU, Context, CrossAttention, SpatialTransformer, normalise, pixels, tokens


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def softmax_attention(q, k, v):
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


def test_context_is_frozen():
    context = Context(torch.zeros(1, 2, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.text = torch.ones(1, 2, 3)


def test_texts_of_transformers_go_wherever_the_context_goes():
    own, plain = torch.ones(2, 3, 4), torch.zeros(1, 3, 4)
    context = Context(2 * own, texts={"middle_block.1": own, "output_blocks.3.1": -own})
    together = Context.cat([Context(plain), context])  # rows without texts of their own have the one
    for name, expected in (("middle_block.1", own), ("output_blocks.3.1", -own)):
        layer = f"{name}.transformer_blocks.0.attn2"
        assert torch.equal(together.at(layer).text, torch.cat([plain, expected])) and not together.at(layer).texts
        assert torch.equal(together.map(lambda rows: rows[1:]).becomes(Context).at(layer).text, expected)
        assert together.to("cpu", torch.float16).at(layer).text.dtype == torch.float16
    assert Context(plain).at("middle_block.1.transformer_blocks.0.attn2").text is plain
    with pytest.raises(KeyError):
        context.at("input_blocks.1.1.transformer_blocks.0.attn2")


@pytest.mark.parametrize("upcast", [False, True])
def test_rows_of_other_lengths_attend_to_their_own_tokens_alone(upcast):
    layer = CrossAttention(12, context_dim=7, heads=3, dim_head=4, upcast=upcast)
    x, texts = torch.randn(4, 5, 12), [torch.randn(1, length, 7) for length in (3, 6, 2)]
    together = Context.cat([Context.cat([Context(text) for text in texts[:2]]), Context(texts[2].repeat(2, 1, 1))])
    assert together.text.shape == (4, 6, 7) and together.attended.sum(1).tolist() == [3, 6, 2, 2]
    own = [layer(x[i : i + 1], Context(text)) for i, text in enumerate([*texts, texts[2]])]
    torch.testing.assert_close(layer(x, together), torch.cat(own))
    last = together.map(lambda rows: rows[2:])
    torch.testing.assert_close(layer(x[2:], last.becomes(Context)), torch.cat(own[2:]))
    assert Context.cat([Context(texts[0]), Context(-texts[0])]).attended is None


@pytest.mark.parametrize("channels, groups", [(48, 16), (64, 32), (96, 32), (128, 32), (144, 16), (320, 32), (6, 2)])
def test_groups_divide_the_width(channels, groups):
    assert normalise(channels, eps=1e-5).num_groups == groups


def test_tokens_run_along_rows_and_pixels_undo_them():
    x = torch.randn(2, 3, 4, 5)
    assert tokens(x).shape == (2, 20, 3)
    assert torch.equal(tokens(x)[:, 7], x[:, :, 1, 2])
    assert torch.equal(pixels(tokens(x), x.shape[2:]), x)


def test_split_gives_heads_consecutive_channels_and_merge_undoes_it():
    layer = CrossAttention(12, heads=3, dim_head=4)
    t = torch.randn(2, 5, 12)
    assert layer.split(t).shape == (2, 3, 5, 4)
    assert torch.equal(layer.split(t)[:, 1], t[:, :, 4:8])
    assert torch.equal(layer.merge(layer.split(t)), t)


def test_cross_attention_is_its_formula_head_by_head():
    layer = CrossAttention(12, context_dim=7, heads=3, dim_head=4)
    x, text = torch.randn(2, 5, 12), torch.randn(2, 6, 7)
    q, k, v = layer.to_q(x), layer.to_k(text), layer.to_v(text)
    heads = [softmax_attention(*(t[..., 4 * h : 4 * h + 4] for t in (q, k, v))) for h in range(3)]
    torch.testing.assert_close(layer(x, Context(text)), layer.to_out(torch.cat(heads, dim=-1)))


def test_without_context_it_is_self_attention():
    layer = CrossAttention(12, heads=3, dim_head=4)
    x = torch.randn(2, 5, 12)
    assert torch.equal(layer(x), layer(x, Context(x)))


@pytest.mark.parametrize("upcast", [False, True])
def test_values_may_carry_extra_channels(upcast):
    layer = CrossAttention(12, heads=3, dim_head=4, upcast=upcast)
    q, k, v, extra = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4), torch.rand(2, 3, 6, 2)
    out = layer.attend(q, k, torch.cat([v, extra], dim=-1))
    torch.testing.assert_close(out[..., :4], layer.attend(q, k, v))
    torch.testing.assert_close(out[..., 4:], softmax_attention(q, k, extra))


def test_upcast_changes_nothing_in_float32():
    plain, upcast = CrossAttention(12, 7, 3, 4), CrossAttention(12, 7, 3, 4, upcast=True)
    upcast.load_state_dict(plain.state_dict())
    x, context = torch.randn(2, 5, 12), Context(torch.randn(2, 6, 7))
    assert torch.equal(upcast(x, context), plain(x, context))


@pytest.mark.parametrize("autocast", [False, True])
def test_upcast_computes_in_float32_and_returns_the_value_dtype(autocast):
    layer = CrossAttention(12, heads=3, dim_head=4, upcast=True)
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.bfloat16) * 10 for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = layer.attend(q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, softmax_attention(q.float(), k.float(), v.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_survives_logits_that_overflow_half_precision(dtype):
    """The 768-pixel SD 2.1's attention at its real size, 96 × 96 latents, with queries and keys as large as its own."""
    torch.manual_seed(0)
    layer = CrossAttention(64, heads=1, dim_head=64, upcast=True).requires_grad_(False)
    x = torch.randn(1, 96 * 96, 64)
    for projection in (layer.to_q, layer.to_k):
        projection.weight.mul_(500 / projection(x).std())
    with torch.autocast("cpu", dtype=dtype):
        q, k = layer.to_q(x), layer.to_k(x)
        out = layer(x)
    assert q.dtype == k.dtype == out.dtype == dtype
    assert q.isfinite().all() and k.isfinite().all()
    logits = (q[:, :256].half() @ k.half().mT) / 8  # as LDM computes them, in half precision
    assert not logits.isfinite().all() and not logits.softmax(-1).isfinite().all()
    expected = softmax_attention(q[:, :256].float(), k.float(), layer.to_v(x)) @ layer.to_out[0].weight.T
    error = out[:, :256].float() - expected - layer.to_out[0].bias
    assert out.isfinite().all()
    assert error.norm() < 0.02 * expected.norm()


def test_geglu_gates_with_the_second_half_and_the_exact_gelu():
    layer = GEGLU(3, 4)
    x = torch.randn(2, 5, 3)
    value, gate = layer.proj(x)[..., :4], layer.proj(x)[..., 4:]
    torch.testing.assert_close(layer(x), value * 0.5 * gate * (1 + torch.erf(gate / 2**0.5)))


@pytest.mark.parametrize("use_linear", [False, True])
def test_spatial_transformer_starts_as_the_identity(use_linear):
    layer = SpatialTransformer(32, heads=2, dim_head=16, context_dim=7, use_linear=use_linear)
    x = torch.randn(2, 32, 4, 6)
    assert torch.equal(layer(x, Context(torch.randn(2, 6, 7))), x)


def test_linear_and_convolutional_projections_are_the_same_map():
    conv = SpatialTransformer(32, heads=2, dim_head=16, context_dim=7, depth=2)
    torch.nn.init.normal_(conv.proj_out.weight)
    linear = SpatialTransformer(32, heads=2, dim_head=16, context_dim=7, depth=2, use_linear=True)
    linear.load_state_dict({name: t.squeeze() if t.ndim == 4 else t for name, t in conv.state_dict().items()})
    x, context = torch.randn(2, 32, 4, 6), Context(torch.randn(2, 6, 7))
    assert (conv(x, context) - x).std() > 0.1
    torch.testing.assert_close(linear(x, context), conv(x, context), atol=1e-5, rtol=1e-5)
