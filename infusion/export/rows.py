"""The UNet's side of `infusion.export.diffusers`: customised rows behind the batch, in every cross-attention.

Legend for shapes: R rows of a call, A of them with a concept, K concepts in the call, L text tokens, H heads, D head
width, C = H·D, N image tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Call:
    """What the cross-attentions of one call of the UNet get in place of the text.

    Attributes:
        text: (R, L, D), of the pipeline's own rows. rows: (A,), those that a customised row follows.
        gates: (A, K, L), times the strength. residuals: by layer, (K, C).
    """

    text: Tensor
    rows: Tensor
    gates: Tensor
    residuals: Mapping[str, Tensor]

    def append(self, value: Any) -> Any:
        """A value of R rows, or a collection of such, with a row for each customised one behind them."""
        if isinstance(value, Tensor):
            return torch.cat([value, value[self.rows]]) if value.dim() and len(value) == len(self.text) else value
        if isinstance(value, dict):  # image prompts join the text, which has R rows
            return {name: part if name == "image_embeds" else self.append(part) for name, part in value.items()}
        return type(value)(map(self.append, value)) if isinstance(value, list | tuple) else value


class Edited:
    """A cross-attention whose rows behind the pipeline's own are customised: `out[rows] + W_out (A_F g) r`.

    Its processor stays its own, so that LoRA, IP-Adapter and others find it, before and after.
    """

    def __init__(self, attention: nn.Module, name: str) -> None:
        self.attention, self.name = attention, name
        self.before, self.base = vars(attention).get("forward"), attention.forward
        attention.forward = self.forward

    def remove(self) -> None:
        del self.attention.forward
        if self.before is not None:
            self.attention.forward = self.before

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Tensor | None = None,
                **kwargs: Any) -> Tensor:  # fmt: skip
        """As diffusers' `Attention.forward`; with image prompts, what stands for the text is a tuple."""
        text = encoder_hidden_states
        call, *images = text if isinstance(text, tuple) else (text,)
        if not isinstance(call, Call):
            return self.base(hidden_states, text, attention_mask, **kwargs)
        hidden = hidden_states[: len(call.text)]
        out = self.base(hidden, (call.text, *images) if images else call.text, attention_mask, **kwargs)
        return torch.cat([out, out[call.rows] + self.edit(hidden[call.rows], call, attention_mask)])

    def edit(self, hidden: Tensor, call: Call, mask: Tensor | None) -> Tensor:
        """`W_out Σ_k a_k ⊗ r_k` of each customised row, (A, N, C), with the mass `a_k = A_F g_k`.

        It is a sum over heads: of each head's mass with what W_out makes of that head's part of r.
        """
        attention, heads, concepts = self.attention, self.attention.heads, call.gates.shape[1]
        q = attention.to_q(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)  # (A, H, N, D)
        k = attention.to_k(call.text[call.rows]).unflatten(-1, (heads, -1)).transpose(1, 2)  # (A, H, L, D)
        values = F.pad(call.gates.mT, (0, max(0, k.shape[-1] - concepts))).to(k)  # (A, L, D): fused kernels want D
        values = values[:, None].expand(-1, heads, -1, -1)
        bias = None if mask is None else mask[call.rows][:, None]
        mass = F.scaled_dot_product_attention(q, k, values, attn_mask=bias)[..., :concepts]  # (A, H, N, K)
        residuals = call.residuals[self.name].to(k).unflatten(-1, (1, heads, -1))  # (K, 1, H, D)
        parts = (torch.eye(heads, dtype=k.dtype, device=k.device)[..., None] * residuals).flatten(0, 1).flatten(1)
        project = attention.to_out[0]
        basis = project(parts) - project(torch.zeros_like(parts[:1]))  # (K·H, C): linear, but for the bias
        return mass.permute(0, 2, 3, 1).flatten(2) @ basis


def layer_names(unet: nn.Module) -> dict[str, str]:
    """The cross-attentions' names in a concept file (LDM's) -> those in diffusers' UNet."""
    places, number = [("middle_block.1.", "mid_block.attentions.0.")], 0
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            number += 1
            places.append((f"input_blocks.{number}.1.", f"down_blocks.{i}.attentions.{j}."))
        number += bool(block.downsamplers)
    up = [(i, j) for i, block in enumerate(unet.up_blocks) for j in range(len(block.resnets))]
    places += [(f"output_blocks.{n}.1.", f"up_blocks.{i}.attentions.{j}.") for n, (i, j) in enumerate(up)]
    names = [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
    return {name.replace(theirs, ours): name for ours, theirs in places for name in names if name.startswith(theirs)}


def plain(unet: nn.Module | None) -> nn.Module | None:
    """The UNet itself, of a compiled one."""
    return getattr(unet, "_orig_mod", unet)
