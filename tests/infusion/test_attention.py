"""The streams against their definition: softmax(Q_F Kᵀ / √D) (V + g rᵀ)."""

import copy

import pytest
import torch
from torch import nn

from infusion.attention import (
    CustomisedPass,
    EditedCrossAttention,
    FoundationPass,
    OwnPass,
    ResidualValue,
    StackedPass,
    residual_share,
)
from infusion.inject import cross_attention_layers, inject
from ldm.models.attention import Context, CrossAttention
from ldm.models.unet import UNet
from tests.infusion.conftest import inputs, random_residuals, tiny_unet


class TwoStreams(nn.Module):
    """The definition: foundation rows first, customised rows second, both read with the foundation's whole map."""

    def __init__(self, base: CrossAttention, residuals: list[torch.Tensor], gates: torch.Tensor, own: bool = False):
        super().__init__()
        self.base, self.own = base, own
        self.residuals, self.gates = nn.ParameterList(residuals), gates

    def forward(self, x, context):
        base, rows = self.base, len(x) // 2
        q = base.split(base.to_q(x))
        k, v = base.split(base.to_k(context.text))[:rows], base.split(base.to_v(context.text))[:rows]
        foundation_map, own_map = ((t @ k.mT / base.dim_head**0.5).softmax(-1) for t in q.chunk(2))
        edited = v
        for gate, residual in zip(self.gates.unbind(1), self.residuals, strict=True):
            outer = gate[:, None, :, None] * residual.view(base.heads, 1, base.dim_head)  # (B, H, L, D)
            edited = edited + outer
        out = torch.cat([foundation_map @ v, (own_map if self.own else foundation_map) @ edited])
        return base.to_out(base.merge(out))


def reference(unet: UNet, residuals, latents, timesteps, text, gates, own=False):
    """Both streams in one doubled batch, on a copy of the UNet: foundation, customised, residual parameters."""
    unet, parameters = copy.deepcopy(unet), {}
    for name, layer in cross_attention_layers(unet).items():
        module = TwoStreams(layer, [r.clone() for r in residuals[name]], gates, own)
        parameters[name] = list(module.residuals)
        parent, _, attribute = name.rpartition(".")
        setattr(unet.get_submodule(parent), attribute, module)
    both = unet(torch.cat([latents] * 2), torch.cat([timesteps] * 2), torch.cat([text] * 2))
    return *both.chunk(2), parameters


def edited_unet(concepts: int = 1, checkpoint: bool = False, dtype=torch.float64):
    unet = tiny_unet(checkpoint).to(dtype)
    widths = {name: layer.heads * layer.dim_head for name, layer in cross_attention_layers(unet).items()}
    edits = {
        name: nn.ModuleList(ResidualValue(nn.Parameter(torch.zeros(width))).to(dtype) for _ in range(concepts))
        for name, width in widths.items()
    }
    inject(unet, edits)
    return unet, edits


def customise(unet, latents, timesteps, text, gates, strengths=None):
    """The foundation's and the customised prediction."""
    tape = {}
    with torch.no_grad():
        foundation = unet(latents, timesteps, FoundationPass(text, gates, tape))
    strengths = torch.ones(gates.shape[1]) if strengths is None else strengths
    return foundation, unet(latents, timesteps, CustomisedPass(text, tape, strengths))


def randomise(edits, scale=1.0):
    torch.manual_seed(2)
    for residuals in edits.values():
        random_residuals(dict(enumerate(residuals)), scale)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("concepts", [1, 2])
def test_rank_one_form_is_the_two_stream_definition(concepts, checkpoint):
    plain, (unet, edits) = tiny_unet().double(), edited_unet(concepts, checkpoint)
    randomise(edits)
    arguments = inputs(2, concepts)
    expected_foundation, expected, parameters = reference(
        plain, {n: [e.residual.detach() for e in edit] for n, edit in edits.items()}, *arguments
    )
    foundation, customised = customise(unet, *arguments)
    torch.testing.assert_close(foundation, expected_foundation, atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(customised, expected, atol=1e-11, rtol=1e-9)
    assert (customised - foundation).abs().max() > 0.01  # the residuals matter here

    weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    (customised * weights).sum().backward()
    for name, edit in edits.items():
        for residual, parameter in zip(edit, parameters[name], strict=True):
            assert residual.residual.grad.abs().max() > 0
            torch.testing.assert_close(residual.residual.grad, parameter.grad, atol=1e-11, rtol=1e-8)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_own_attention_is_its_definition(checkpoint):
    plain, (unet, edits) = tiny_unet().double(), edited_unet(1, checkpoint)
    randomise(edits)
    latents, timesteps, text, gates = inputs()
    residuals = {n: [e.residual.detach() for e in edit] for n, edit in edits.items()}
    _, expected, parameters = reference(plain, residuals, latents, timesteps, text, gates, own=True)
    _, with_foundation, _ = reference(plain, residuals, latents, timesteps, text, gates)
    prediction = unet(latents, timesteps, OwnPass(text, gates, {}, torch.ones(1)))
    torch.testing.assert_close(prediction, expected, atol=1e-11, rtol=1e-9)
    assert (prediction - with_foundation).abs().max() > 1e-4  # the two methods are not the same

    expected.square().sum().backward()
    prediction.square().sum().backward()
    for name, edit in edits.items():
        torch.testing.assert_close(edit[0].residual.grad, parameters[name][0].grad, atol=1e-10, rtol=1e-8)


def test_residual_keys_are_their_definition():
    """softmax(Q (K + Σ g r_Kᵀ)ᵀ / √D) (V + Σ g rᵀ), of two concepts of which one has a key."""
    torch.manual_seed(0)
    base = CrossAttention(24, 32, heads=2, dim_head=16).double()
    x, text, gates = torch.randn(2, 9, 24).double(), torch.randn(2, 5, 32).double(), torch.rand(2, 2, 5).double()
    with_key = ResidualValue(torch.randn(32), torch.randn(32)).double()
    layer = EditedCrossAttention(base, "layer", nn.ModuleList([with_key, ResidualValue(torch.randn(32)).double()]))
    strengths = torch.tensor([0.7, 1.3]).double()

    k = base.to_k(text) + gates[:, 0, :, None] * 0.7 * with_key.key
    v = base.to_v(text) + torch.einsum(
        "bkl,k,kc->blc", gates, strengths, torch.stack([e.residual for e in layer.edits])
    )
    q, k, v = base.split(base.to_q(x)), base.split(k), base.split(v)
    expected = base.to_out(base.merge((q @ k.mT / 4).softmax(-1) @ v))
    torch.testing.assert_close(layer(x, OwnPass(text, gates, {}, strengths)), expected)
    without = nn.ModuleList(ResidualValue(edit.residual) for edit in layer.edits)
    plain = EditedCrossAttention(base, "layer", without)(x, OwnPass(text, gates, {}, strengths))
    assert (plain - expected).abs().max() > 0.01  # the key matters
    taped: dict = {}
    layer(x, FoundationPass(text, gates, taped))  # the foundation knows no keys
    k, v = base.split(base.to_k(text)), base.split(base.to_v(text))
    torch.testing.assert_close(
        taped["layer"][0], base.merge(base.attend(q, base.split(base.to_k(text)), base.split(base.to_v(text))))
    )


@pytest.mark.parametrize("own", [False, True])
def test_a_region_bounds_where_the_layers_change(own):
    """Within one layer the residual is added to the tokens of the region, by the share that the region covers."""
    unet, edits = edited_unet(2)
    randomise(edits)
    name, layer = next((n, m) for n, m in unet.named_modules() if isinstance(m, EditedCrossAttention))
    x, (_, _, text, gates) = torch.randn(2, 16, layer.base.to_q.in_features).double(), inputs(2, 2)
    regions = torch.rand(2, 8, 8).double()  # four latents to a token
    regions[0] = torch.cat([torch.zeros(8, 4), torch.ones(8, 4)], 1)  # the right half
    strengths = torch.ones(2).double()

    def added(regions, strengths):
        if own:
            customised = layer(x, OwnPass(text, gates, {}, strengths, regions))
        else:
            context = StackedPass(torch.cat([text, text]), gates, torch.arange(2), strengths, regions)
            customised = layer(torch.cat([x, x]), context)[2:]
        return customised - layer(x, Context(text))  # (B, N, C)

    first, second = torch.eye(2).double()
    whole, bounded = added(None, first), added(regions, first)
    right = torch.arange(16) % 4 >= 2
    torch.testing.assert_close(bounded[:, right], whole[:, right])
    assert bounded[:, ~right].abs().max() < 1e-12 < whole[:, ~right].abs().max()
    covered = regions[1].unflatten(0, (4, 2)).unflatten(2, (4, 2)).mean((1, 3)).flatten()  # (N,)
    torch.testing.assert_close(added(regions, second), added(None, second) * covered[:, None])
    torch.testing.assert_close(added(regions, strengths), added(regions, first) + added(regions, second))


@pytest.mark.parametrize("concepts", [1, 3])
def test_without_residuals_every_pass_is_the_base_to_the_bit(concepts):
    plain, (unet, _) = tiny_unet(), edited_unet(concepts, dtype=torch.float32)
    latents, timesteps, text, gates = inputs(2, concepts, torch.float32)
    base = plain(latents, timesteps, text)
    foundation, customised = customise(unet, latents, timesteps, text, gates)
    own = unet(latents, timesteps, OwnPass(text, gates, {}, torch.ones(concepts)))
    assert torch.equal(foundation, customised)
    assert torch.equal(foundation, own)
    assert torch.equal(unet(latents, timesteps, Context(text)), base)
    assert torch.equal(foundation, base)


def test_the_foundation_stream_never_changes_with_the_residual():
    unet, edits = edited_unet()
    arguments = inputs()
    before, same = customise(unet, *arguments)
    randomise(edits, 30)
    after, customised = customise(unet, *arguments)
    assert torch.equal(before, after)
    assert not torch.allclose(same, customised)


def test_the_customised_stream_follows_the_foundation_stream():
    unet, edits = edited_unet()
    randomise(edits)
    latents, timesteps, text, gates = inputs()
    tape, other = {}, {}
    unet(latents, timesteps, FoundationPass(text, gates, tape))
    unet(torch.randn_like(latents), timesteps, FoundationPass(text, gates, other))
    first, second = (unet(latents, timesteps, CustomisedPass(text, t, torch.ones(1))) for t in (tape, other))
    assert (first - second).abs().max() > 0.01


def test_concepts_add_up_and_commute():
    unet, edits = edited_unet(2)
    layer = unet.get_submodule("middle_block.1.transformer_blocks.0.attn2")
    randomise(edits)
    out, mass = torch.randn(2, 16, 64).double(), torch.rand(2, 2, 2, 16).double()
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])

    def blend(strengths):
        return layer.blend(out, mass, layer.residuals(strengths))

    added = blend(0.5 * one + 2 * two)
    alone = 0.5 * (blend(one) - out) + 2 * (blend(two) - out)
    torch.testing.assert_close(added, out + alone)

    arguments = inputs(2, 2)
    _, first = customise(unet, *arguments, strengths=torch.tensor([0.5, 2.0]))
    for edit in edits.values():
        a, b = (e.residual.data for e in edit)
        edit[0].residual.data, edit[1].residual.data = b, a
    _, swapped = customise(unet, *arguments[:3], arguments[3].flip(1), strengths=torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(first, swapped)


def test_stacked_rows_are_the_two_passes():
    """Three foundation rows, the first without gates; behind them customised rows that follow the third and second."""
    unet, edits = edited_unet()
    randomise(edits)
    latents, timesteps, text, gates = inputs(3)
    tape, stacked = {}, {}
    foundation = unet(latents, timesteps, FoundationPass(text, gates, tape))
    customised = unet(latents, timesteps, CustomisedPass(text, tape, torch.full((1,), 0.7)))
    rows = torch.tensor([0, 1, 2, 2, 1])
    context = StackedPass(text[rows], gates[1:], rows[3:] - 1, torch.full((1,), 0.7), None, stacked)
    together = unet(latents[rows], timesteps[rows], context)
    torch.testing.assert_close(together, torch.cat([foundation, customised[rows[3:]]]))
    for name, (out, mass) in tape.items():
        torch.testing.assert_close(stacked[name], (out[1:], mass[1:]))
    context = StackedPass(text, gates, rows[:0], torch.ones(1))
    torch.testing.assert_close(unet(latents, timesteps, context), foundation)


def test_rows_without_a_gate_are_the_foundation():
    unet, edits = edited_unet()
    randomise(edits)
    latents, timesteps, text, gates = inputs()
    gates[0] = 0
    foundation, customised = customise(unet, latents, timesteps, text, gates)
    assert torch.equal(foundation[0], customised[0])
    assert not torch.allclose(foundation[1], customised[1])


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("heads, dim_head, concepts", [(2, 40, 1), (3, 10, 9)])
def test_mass_is_the_attention_on_the_gates(heads, dim_head, concepts, upcast):
    torch.manual_seed(0)
    base = CrossAttention(24, 16, heads, dim_head, upcast)
    layer = EditedCrossAttention(base, "layer", nn.ModuleList())
    x, text, gates = torch.randn(2, 7, 24), torch.randn(2, 5, 16), torch.rand(2, concepts, 5)
    out, mass = layer.attention(x, Context(text), gates)
    attention = (base.split(base.to_q(x)) @ base.split(base.to_k(text)).mT / dim_head**0.5).softmax(-1)  # (B, H, N, L)
    torch.testing.assert_close(mass, torch.einsum("bhnl,bkl->bkhn", attention, gates))
    torch.testing.assert_close(base.to_out(out), base(x, Context(text)))


def test_a_pass_of_another_kind_is_a_class():
    """The layers ask the context; neither they nor the UNet know the passes there are."""

    class Doubled(Context):
        def attend(self, layer, x):
            return 2 * layer.base(x, self)

    unet, edits = edited_unet()
    layer = unet.get_submodule("middle_block.1.transformer_blocks.0.attn2")
    x, text = torch.randn(2, 16, 64).double(), inputs()[2]
    assert torch.equal(layer(x, Doubled(text)), 2 * layer(x, Context(text)))


def test_customised_pass_needs_the_foundation_pass():
    unet, _ = edited_unet()
    latents, timesteps, text, _ = inputs()
    with pytest.raises(ValueError, match="follows a foundation pass"):
        unet(latents, timesteps, CustomisedPass(text, {}, torch.ones(1)))


def test_bfloat16_autocast_keeps_the_residuals_in_float32():
    plain, (unet, edits) = tiny_unet(), edited_unet(dtype=torch.float32)
    randomise(edits)
    arguments = inputs(dtype=torch.float32)
    residuals = {n: [e.residual.detach() for e in edit] for n, edit in edits.items()}
    _, expected, parameters = reference(plain, residuals, *arguments)
    expected.square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        _, customised = customise(unet, *arguments)
        customised.float().square().mean().backward()
    for name, edit in edits.items():
        gradient, exact = edit[0].residual.grad, parameters[name][0].grad
        assert gradient.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(gradient, exact, dim=0) > 0.99


def test_residual_share_is_the_ratio_of_norms():
    torch.manual_seed(0)
    out, mass, residuals = torch.randn(2, 6, 12), torch.rand(2, 2, 3, 6), torch.randn(2, 12)
    added = torch.einsum("bkhn,khd->bnhd", mass, residuals.view(2, 3, 4)).flatten(2)
    expected = added.flatten(1).norm(dim=1) / out.flatten(1).norm(dim=1)
    torch.testing.assert_close(residual_share(out, mass, residuals), expected)
