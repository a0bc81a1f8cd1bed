import pytest
import torch
from torch import nn

from infusion.attention import EditedCrossAttention, ResidualValue
from infusion.inject import cross_attention_layers, edited, inject, remove
from ldm.models.unet import UNet
from tests.infusion.conftest import infusion_edits, inputs, random_residuals, tiny_unet


def zeros(width: int) -> ResidualValue:
    """A residual to be learned, which does nothing yet."""
    return ResidualValue(nn.Parameter(torch.zeros(width)))


LAYERS = [
    "input_blocks.1.1.transformer_blocks.0.attn2",
    "input_blocks.3.1.transformer_blocks.0.attn2",
    "middle_block.1.transformer_blocks.0.attn2",
    *(f"output_blocks.{i}.1.transformer_blocks.0.attn2" for i in range(4)),
]


def state(unet):
    return [(name, module) for name, module in unet.named_modules()]


def test_names_with_and_without_edits():
    unet = tiny_unet()
    layers = cross_attention_layers(unet)
    assert list(layers) == LAYERS
    inject(unet, infusion_edits(unet))
    assert cross_attention_layers(unet) == layers
    assert all(isinstance(unet.get_submodule(name), EditedCrossAttention) for name in LAYERS)


def test_remove_restores_the_very_same_modules():
    unet = tiny_unet()
    latents, timesteps, text, _ = inputs(dtype=torch.float32)
    modules, tensors, before = state(unet), list(unet.state_dict()), unet(latents, timesteps, text)
    edits = infusion_edits(unet)
    random_residuals(edits)
    inject(unet, edits)
    assert torch.equal(unet(latents, timesteps, text), before)
    assert f"{LAYERS[0]}.base.to_q.weight" in unet.state_dict()
    remove(unet)
    assert [(name, id(module)) for name, module in state(unet)] == [(name, id(module)) for name, module in modules]
    assert list(unet.state_dict()) == tensors
    assert torch.equal(unet(latents, timesteps, text), before)
    remove(unet)  # nothing to do


def test_edited_sets_other_edits_aside():
    unet = tiny_unet()
    inject(unet, {LAYERS[0]: zeros(32)})
    outer = unet.get_submodule(LAYERS[0])
    with pytest.raises(KeyError), edited(unet, {LAYERS[2]: zeros(64)}):
        assert unet.get_submodule(LAYERS[0]) is outer.base
        assert isinstance(unet.get_submodule(LAYERS[2]), EditedCrossAttention)
        raise KeyError
    assert unet.get_submodule(LAYERS[0]) is outer
    assert not isinstance(unet.get_submodule(LAYERS[2]), EditedCrossAttention)


@pytest.mark.parametrize(
    "edits, message",
    [
        ({}, "nothing to inject"),
        ({"middle_block.9.attn2": zeros(64)}, "no cross-attention layer"),
        ({LAYERS[2]: zeros(64), LAYERS[0]: zeros(64)}, "32 wide"),
        ({LAYERS[0]: nn.ModuleList([zeros(32), zeros(31)])}, "32 wide"),
    ],
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(edits, message):
    unet = tiny_unet()
    modules = state(unet)
    with pytest.raises(ValueError, match=message):
        inject(unet, edits)
    assert state(unet) == modules


def test_injecting_twice_is_an_error():
    unet = tiny_unet()
    inject(unet, infusion_edits(unet))
    with pytest.raises(ValueError, match="edited already"):
        inject(unet, {LAYERS[0]: zeros(32)})


@pytest.mark.parametrize("heads, context_dim", [({"num_heads": 8}, 768), ({"num_head_channels": 64}, 1024)])
def test_stable_diffusion_learns_12480_numbers_in_16_layers(heads, context_dim):
    with torch.device("meta"):
        unet = UNet(**heads, context_dim=context_dim).requires_grad_(False)
        inject(unet, infusion_edits(unet))
    learned = [parameter.numel() for parameter in unet.parameters() if parameter.requires_grad]
    assert sorted(learned) == [320] * 5 + [640] * 5 + [1280] * 6
    assert sum(learned) == 12480
