"""Puts edits into a UNet's cross-attention layers, and takes them out again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from infusion.attention import EditedCrossAttention, ResidualValue
from infusion.deltas import weights_edited
from ldm.models.attention import CrossAttention
from ldm.util.cli import UserError


def cross_attention_layers(unet: nn.Module) -> dict[str, CrossAttention]:
    """The UNet's own cross-attention layers by name, in the order of the UNet, edited or not.

    A name is the layer's place in the UNet, such as `input_blocks.1.1.transformer_blocks.0.attn2`.
    """
    layers = {}
    for name, module in unet.named_modules():
        if isinstance(module, EditedCrossAttention):
            layers[name] = module.base
        elif isinstance(module, CrossAttention) and name.rpartition(".")[2] == "attn2":
            layers[name] = module
    return layers


def inject(unet: nn.Module, edits: Mapping[str, nn.Module]) -> None:
    """Replace cross-attention layers by edited ones that wrap them; the layers themselves stay as they are.

    Args:
        unet: a UNet without edits.
        edits: layer name -> a `ResidualValue`, or an `nn.ModuleList` with one for each concept.

    Raises:
        ValueError: no edits, an edit of a layer that the UNet does not have or of another width, or a UNet that is
            edited already. The UNet is then left as it was.
    """
    layers = cross_attention_layers(unet)
    if not edits:
        raise ValueError("there is nothing to inject: the edits match no cross-attention layer")
    if _edited_layers(unet):
        raise ValueError("the UNet is edited already: remove() the edits first, or use edited() to set them aside")
    if unknown := [name for name in edits if name not in layers]:
        raise UserError(f"the UNet has no cross-attention layer {unknown[0]!r}; it has {', '.join(layers) or 'none'}")
    lists = {name: edit if isinstance(edit, nn.ModuleList) else nn.ModuleList([edit]) for name, edit in edits.items()}
    for name, residuals in lists.items():
        width = layers[name].heads * layers[name].dim_head
        for edit in residuals:
            if isinstance(edit, ResidualValue) and any(own.shape != (width,) for own in edit.parameters()):
                raise UserError(f"{name} is {width} wide, but its residual is {tuple(edit.residual.shape)}")
    for name, residuals in lists.items():
        _put(unet, name, EditedCrossAttention(layers[name], name, residuals).train(layers[name].training))


def remove(unet: nn.Module) -> None:
    """Put the very same base layers back; a UNet without edits is left alone."""
    for name, module in _edited_layers(unet).items():
        _put(unet, name, module.base)


@contextmanager
def edited(unet: nn.Module, edits: Mapping[str, nn.Module]) -> Iterator[None]:
    """The UNet with exactly these edits inside the `with`; any others are set aside and put back afterwards.

    Without edits it is the base model.
    """
    previous = _edited_layers(unet)
    remove(unet)
    try:
        if edits:
            inject(unet, edits)
        yield
    finally:
        remove(unet)
        for name, module in previous.items():
            _put(unet, name, module)


@contextmanager
def unedited(unet: nn.Module) -> Iterator[None]:
    """The base model inside the `with`; edits of layers and of weights are set aside and put back afterwards."""
    with edited(unet, {}), weights_edited(unet, {}):
        yield


def _edited_layers(unet: nn.Module) -> dict[str, EditedCrossAttention]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, EditedCrossAttention)}


def _put(unet: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(unet.get_submodule(parent), attribute, module)
