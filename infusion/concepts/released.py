"""Concepts that Infusion's released code wrote: `.ckpt` files of torch.save.

Such a file is a dict with `global_step`, `target_input` (the encoding of one sentence, or of one token) and under
`target_output` what was learned, a tensor (C,) for each layer: `<layer>.to_v.target_output`, and where xformers was
installed `<layer>.to_k.target_output` (github.com/zwl666666/infusion). Files with the same tensors under `state_dict`
or at the top, and with the UNet's place in the model before the names, are read too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from infusion.attention import key_name
from infusion.concepts.concept import Concept
from infusion.concepts.places import find_architecture, skeleton
from infusion.gate import Gate
from infusion.inject import cross_attention_layers
from ldm.util.cli import UserError, naming
from ldm.weights.files import TensorFile, tensors_of
from ldm.weights.names import PREFIXES
from ldm.weights.recognise import LEARNED

TEMPLATES = ("a photo of a {}",)


def load(
    path: str | Path,
    superclass: str,
    templates: Sequence[str] = TEMPLATES,
    architecture: str | None = None,
    gate: str = "hard",
    attention: str = "own",
    values_only: bool = False,
) -> Concept:
    """A released concept; the file does not say what most of the arguments do.

    Args:
        path: the `.ckpt` file.
        superclass: the noun that stands for the concept in prompts.
        templates: training prompts, which matter to the gates "sigmoid" and "global" alone.
        architecture: the base model's; None goes by the width of the file's `target_input`.
        gate, attention: the defaults are what the released code does.
        values_only: leave out residual keys.

    Raises:
        ValueError: the file cannot be read safely, holds no residual values, has residual keys while the attention is
            not "own", or does not fit the architecture. The message names the file.
    """
    with TensorFile(path) as file, naming(str(path)):
        learned = file.content.get("target_output")
        tensors = {name: file.read(name) for name in file.shapes}
        tensors |= tensors_of(learned if isinstance(learned, Mapping) else {})
        steps = file.content.get("global_step")
        width = next(iter(tensors["target_input"].shape[-1:]), None) if "target_input" in tensors else None
        architecture = find_architecture({}, {"architecture": architecture}, width)
        values, keys = (_residuals(tensors, part, architecture) for part in ("to_v", "to_k"))
        if not values:
            raise UserError(f"no concept of the released code: no tensor is named *.to_v.{LEARNED}")
        if values_only or not any(key.any() for key in keys.values()):
            keys = {}
        if keys and attention != "own":
            raise UserError(
                f"{len(keys)} layers have residual keys (*.to_k.{LEARNED}), which need --attention own; "
                "--values_only leaves them out, which gives another likeness"
            )
        return Concept(
            tensors=values | {key_name(name): key for name, key in keys.items()},
            superclass=superclass,
            templates=tuple(templates),
            architecture=architecture,
            gate=Gate(gate),
            attention=attention,
            steps=steps if isinstance(steps, int) else 0,
        )


def _residuals(tensors: Mapping[str, Tensor], part: str, architecture: str) -> dict[str, Tensor]:
    """Layer name -> residual (C,) of "to_v" or "to_k", in the UNet's order, where each is as wide as its layer."""
    layers = cross_attention_layers(skeleton(architecture).unet)
    end, found = f".{part}.{LEARNED}", {}
    for name, tensor in tensors.items():
        if name.endswith(end):
            layer = name.removesuffix(end).removeprefix(PREFIXES["unet"]).removeprefix("diffusion_model.")
            if layer not in layers:
                raise UserError(f"{architecture} has no cross-attention layer {layer[:100]!r}")
            width = layers[layer].heads * layers[layer].dim_head
            if tensor.shape not in ((width,), (1, width)):
                raise UserError(f"{layer} of {architecture} is {width} wide, the file's is {tuple(tensor.shape)}")
            found[layer] = tensor.reshape(width)
    return {layer: found[layer] for layer in layers if layer in found}
