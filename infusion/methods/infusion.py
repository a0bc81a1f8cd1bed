"""Infusion: a residual value embedding per cross-attention layer, on the foundation's attention (DESIGN section 2)."""

import re
from typing import Literal

import torch
from torch import Tensor, nn

from infusion.attention import CustomisedPass, FoundationPass, OwnPass, ResidualValue, Tape
from infusion.inject import cross_attention_layers

ATTENTIONS = ("foundation", "own")


class Infusion:
    """The method's edits and its training pass.

    Args:
        attention: "foundation": the customised stream takes its attention maps from the foundation stream (the paper).
            "own": it attends with its own queries (what the released code does).
        keys: learn a residual key beside each value (what the released code does where xformers is installed). The
            foundation's attention maps do not change with what is learned, so this needs attention "own".
        layers: regular expression searched for in the layers' names; the layers it matches are learned, the others
            keep a residual of zero. Everything by default.

    Raises:
        ValueError: an unknown attention, keys without attention "own", or no regular expression.
    """

    name = "infusion"

    def __init__(
        self, attention: Literal["foundation", "own"] = "foundation", keys: bool = False, layers: str = ""
    ) -> None:
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, not {attention!r}")
        if keys and attention != "own":
            raise ValueError("residual keys change an attention map, and the foundation's stays: set attention: own")
        try:
            self.layers = re.compile(layers)
        except re.error as error:
            raise ValueError(f"layers is not a regular expression: {layers!r} ({error})") from error
        self.attention, self.keys = attention, keys

    def edits(self, unet: nn.Module) -> dict[str, ResidualValue]:
        """A fresh residual for each cross-attention layer; the learned ones require gradients.

        Raises:
            ValueError: no layer matches.
        """
        edits = {
            name: ResidualValue(layer.heads * layer.dim_head, self.keys).requires_grad_(bool(self.layers.search(name)))
            for name, layer in cross_attention_layers(unet).items()
        }
        if not any(edit.residual.requires_grad for edit in edits.values()):
            known = ", ".join(edits) or "there are none"
            raise ValueError(f"{self.layers.pattern!r} matches none of the cross-attention layers: {known}")
        return edits

    def predict(
        self, unet: nn.Module, latents: Tensor, timesteps: Tensor, text: Tensor, gates: Tensor, tape: Tape
    ) -> Tensor:
        """The customised stream's prediction, with gradients to the residuals and none to the foundation stream.

        Args:
            unet: with this method's edits injected.
            latents: noisy, (B, 4, h, w). timesteps: (B,). text: (B, L, D). gates: (B, L).
            tape: empty; left with the attention of every layer.

        Returns:
            (B, 4, h, w) in the model's own prediction type.
        """
        gates, strengths = gates[:, None], torch.ones(1, device=latents.device)  # (B, 1, L), (1,)
        if self.attention == "own":
            return unet(latents, timesteps, OwnPass(text, gates, tape, strengths))
        with torch.no_grad():
            unet(latents, timesteps, FoundationPass(text, gates, tape))
        return unet(latents, timesteps, CustomisedPass(text, tape, strengths))
