"""Infusion: a residual value embedding per cross-attention layer, on the foundation's attention (docs/method.md)."""

import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from infusion.attention import CustomisedPass, FoundationPass, ResidualValue, Tape, key_name
from infusion.gate import Gate
from infusion.inject import cross_attention_layers
from infusion.methods.base import Method, Tensors, check_names
from infusion.tokens import Word
from ldm.models.attention import Context
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError

if TYPE_CHECKING:
    from infusion.concepts.concept import Concept


class Infusion(Method):
    """The method's edits and its training pass.

    Args:
        attention: "foundation": the customised stream takes its attention maps from the foundation stream (the paper).
            "own": it attends with its own queries (what the released code does).
        keys: learn a residual key beside each value (what the released code does where xformers is installed). The
            foundation's attention maps do not change with what is learned, so this needs attention "own".
        layers: regular expression searched for in the layers' names; the layers it matches are learned, the others
            keep a residual of zero. Everything by default.

    Raises:
        ValueError: keys without attention "own", or no regular expression.
    """

    name = "infusion"
    foundation_learns = False  # whether the foundation stream has gradients

    def __init__(
        self, attention: Literal["foundation", "own"] = "foundation", keys: bool = False, layers: str = ""
    ) -> None:
        if keys and attention != "own":
            raise UserError("residual keys change an attention map, and the foundation's stays: set attention: own")
        try:
            self.layers = re.compile(layers)
        except re.error as error:
            raise UserError(f"layers is not a regular expression: {layers!r} ({error})") from error
        self.attention, self.keys = attention, keys

    @classmethod
    def from_concept(cls, concept: "Concept") -> "Infusion":
        return cls(concept.attention, any(name.endswith(key_name("")) for name in concept.tensors))

    def start(self, sd: StableDiffusion, word: Word) -> dict[str, nn.Parameter]:
        """A residual of zero for each layer, by the layer's name, and the residual keys.

        Raises:
            ValueError: no layer matches.
        """
        widths = {name: layer.heads * layer.dim_head for name, layer in cross_attention_layers(sd.unet).items()}
        learned = [name for name in widths if self.layers.search(name)]
        if not learned:
            known = ", ".join(widths) or "there are none"
            raise UserError(f"{self.layers.pattern!r} matches none of the cross-attention layers: {known}")
        named = {name: name for name in learned} | {key_name(name): name for name in learned if self.keys}
        return {name: nn.Parameter(torch.zeros(widths[layer])) for name, layer in named.items()}

    def differences(self, tensors: Tensors, strength: float = 1.0) -> dict[str, nn.Module]:
        return {}

    def terms(self, sd: StableDiffusion, tensors: Tensors, word: Word) -> list[dict[str, ResidualValue]]:
        layers = cross_attention_layers(sd.unet)
        check_names(tensors, [*layers, *map(key_name, layers)])
        return [
            {
                name: ResidualValue(
                    tensors.get(name, torch.zeros(layer.heads * layer.dim_head)), tensors.get(key_name(name))
                )
                for name, layer in layers.items()
            }
        ]

    def gates(
        self, gate: Gate, encodings: Tensor, mask: Tensor, target: Tensor, inverse_covariance: Tensor | None
    ) -> Tensor:
        return gate(encodings, mask, target, inverse_covariance)[:, None]

    def predict(
        self, unet: nn.Module, latents: Tensor, timesteps: Tensor, context: Context, gates: Tensor, tape: Tape
    ) -> Tensor:
        """The customised stream's prediction."""
        if self.attention == "own":
            return super().predict(unet, latents, timesteps, context, gates, tape)
        with nullcontext() if self.foundation_learns else torch.no_grad():
            unet(latents, timesteps, context.becomes(FoundationPass, gates=gates, tape=tape))
        strengths = torch.ones(1, device=latents.device)
        return unet(latents, timesteps, context.becomes(CustomisedPass, tape=tape, strengths=strengths))
