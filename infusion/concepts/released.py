"""Concepts that Infusion's released code wrote: `.ckpt` files of torch.save, read by `ldm.weights.unpickle`.

Such a file is a dict with `global_step`, `C_inv`, `target_input` (the encoding of one sentence, or of one token),
`embedding`, and under `target_output` what was learned, a tensor (C,) for each layer:
`input_blocks.1.1.transformer_blocks.0.attn2.to_v.target_output` …, and `….to_k.target_output` where xformers was
installed. Facts of github.com/zwl666666/infusion. Files with the same tensors under `state_dict`, or under none, and
with the UNet's place in the model before the names, are read as well.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from infusion.attention import key_name
from infusion.concepts.concept import Concept
from infusion.gate import Gate
from infusion.inject import cross_attention_layers
from ldm.util.config import backbones, instantiate
from ldm.weights.files import TensorFile
from ldm.weights.names import PREFIXES
from ldm.weights.recognise import LEARNED

WIDEST = 2**16  # numbers of a layer, at most
TEMPLATES = ("a photo of a {}",)
PLACES = (PREFIXES["unet"], "diffusion_model.")


class ReleasedFile(TensorFile):
    """The tensors of a released concept, whose `target_output` is read like a `state_dict`.

    Attributes:
        steps: optimiser steps; 0 where the file does not say.

    Raises:
        ValueError: no such file, no pickle, or not one that can be read safely.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        if self.format == "safetensors":
            self.close()
            raise ValueError(f"{path}: a safetensors file, which the released code does not write")
        content = self.content if isinstance(self.content, Mapping) else {}
        steps, learned = content.get("global_step"), content.get("target_output")
        self.steps = steps if type(steps) is int and steps >= 0 else 0
        if isinstance(learned, Mapping):
            self.include(learned)

    def residuals(self, part: str) -> dict[str, Tensor]:
        """Layer name -> residual (C,) or (1, C) of "to_v" or "to_k".

        Raises:
            ValueError: one that is cut off, or too large for a residual.
        """
        end, found = f".{part}.{LEARNED}", {}
        for name in self.shapes:
            if name.endswith(end):
                if math.prod(self.shapes[name]) > WIDEST:
                    raise ValueError(
                        f"{name[:100]} has {math.prod(self.shapes[name]):,} numbers: no residual has as many"
                    )
                layer = name.removesuffix(end)
                for place in PLACES:
                    layer = layer.removeprefix(place)
                found[layer] = self.read(name)
        return found


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
            not "own", or does not fit the architecture; whatever `Concept` refuses. The message names the file.
    """
    with ReleasedFile(path) as file:
        try:
            values, keys = file.residuals("to_v"), file.residuals("to_k")
            if not values:
                raise ValueError(f"no concept of the released code: no tensor is named *.to_v.{LEARNED}")
            if values_only or not any(key.any() for key in keys.values()):
                keys = {}
            if keys and attention != "own":
                raise ValueError(
                    f"{len(keys)} layers have residual keys (*.to_k.{LEARNED}), which need --attention own; "
                    "--values_only leaves them out, which gives another likeness"
                )
            architecture = architecture or _architecture(file)
            fitting = _fitting(keys, architecture)
            return Concept(
                tensors=_fitting(values, architecture) | {key_name(name): key for name, key in fitting.items()},
                superclass=superclass,
                templates=tuple(templates),
                architecture=architecture,
                gate=Gate(gate),
                attention=attention,
                steps=file.steps,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _architecture(file: TensorFile) -> str:
    """By the width of text encodings, which is what tells SD 1.5 from 2.1 here."""
    widths = {name: node["params"]["unet"]["params"]["context_dim"] for name, node in backbones().items()}
    for name, width in widths.items():
        if file.shapes.get("target_input", ())[-1:] == (width,):
            return name
    raise ValueError(f"it does not say what base model it is for: --architecture {{{','.join(widths)}}}")


def _fitting(values: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """The residuals (C,) in the UNet's order, where each is as wide as its layer."""
    if architecture not in backbones():
        raise ValueError(f"the architecture must be one of {', '.join(backbones())}, not {architecture!r}")
    with torch.device("meta"):
        layers = cross_attention_layers(instantiate(backbones()[architecture], "sd").unet)
    if unknown := [name for name in values if name not in layers]:
        raise ValueError(f"{architecture} has no cross-attention layer {unknown[0][:100]!r}")
    fitting = {}
    for name, layer in layers.items():
        width = layer.heads * layer.dim_head
        if name in values:
            if values[name].shape not in ((width,), (1, width)):
                raise ValueError(f"{name} of {architecture} is {width} wide, the file's is {tuple(values[name].shape)}")
            fitting[name] = values[name].reshape(width)
    return fitting
