import pytest
import torch

from infusion.inject import inject
from infusion.methods import find_method, method_names
from infusion.methods.infusion import Infusion
from ldm.models.attention import Context
from tests.infusion.conftest import infusion_edits, inputs, random_residuals, tiny_unet


def test_registry():
    assert find_method("infusion") is Infusion
    assert all(find_method(name).name == name for name in method_names())
    with pytest.raises(ValueError, match="there are: .*infusion"):
        find_method("infusoin")


def test_layers_restrict_what_is_learned():
    edits = infusion_edits(tiny_unet(), Infusion(layers=r"^(middle|output)"))
    assert len(edits) == 7
    learned = [name for name, edit in edits.items() if edit.residual.requires_grad]
    assert [name.partition("_")[0] for name in learned] == ["middle"] + 4 * ["output"]


@pytest.mark.parametrize("arguments", [{"layers": "("}, {"keys": True}])
def test_unusable_options_are_errors(arguments):
    with pytest.raises(ValueError):
        Infusion(**arguments)


def test_matching_no_layer_is_an_error():
    with pytest.raises(ValueError, match="matches none.*input_blocks.1.1"):
        infusion_edits(tiny_unet(), Infusion(layers="attn1"))
    with pytest.raises(ValueError, match="there are none"):
        infusion_edits(torch.nn.Linear(2, 2))


def test_keys_are_learned_beside_values():
    unet = tiny_unet()
    method = Infusion("own", keys=True)
    edits = infusion_edits(unet, method)
    random_residuals(edits)
    inject(unet, edits)
    latents, timesteps, text, gates = inputs(dtype=torch.float32)
    method.predict(unet, latents, timesteps, Context(text), gates, {}).square().mean().backward()
    for name, edit in edits.items():
        assert edit.key.shape == edit.residual.shape and edit.key.grad.abs().max() > 0, name


@pytest.mark.parametrize("attention", ["foundation", "own"])
def test_gradients_reach_the_residuals_and_nothing_else(attention):
    unet = tiny_unet()
    method = Infusion(attention)
    edits = infusion_edits(unet, method)
    random_residuals(edits)
    inject(unet, edits)
    latents, timesteps, text, gates = inputs(dtype=torch.float32)
    tape = {}
    method.predict(unet, latents, timesteps, Context(text), gates, tape).square().mean().backward()
    with_gradient = {name for name, parameter in unet.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"{name}.edits.0.residual" for name in edits}
    assert list(tape) == list(edits)
    assert not any(tensor.requires_grad for entry in tape.values() for tensor in entry)
