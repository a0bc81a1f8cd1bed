"""The two streams: foundation rows whose attention is recorded, and customised rows that are steered by it.

Legend for shapes: B batch, N image tokens, L text tokens, K concepts, H heads, D head width, C = H·D.

The customised stream is `A_F (V + g rᵀ)`, with the foundation's attention map A_F. Both streams read the same text, so
`A_F V` is the foundation's own output and the edit is a rank-one addition: `out_F + a ⊗ r` with the attention mass
`a = A_F g` (README, Method).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infusion.deltas import kept
from infusion.sampling.regions import shrink
from ldm.models.attention import Context, CrossAttention

Tape = dict[str, tuple[Tensor, Tensor]]  # layer name -> attention output before to_out (B, N, C), mass (B, K, H, N)


@dataclass(frozen=True, eq=False)
class FoundationPass(Context):
    """A pass of the frozen UNet that leaves each edited layer's attention on the tape.

    Attributes:
        gates: (B, K, L), how strongly each concept is blended at each text token.
        tape: filled by the pass, one entry a layer.
    """

    gates: Tensor
    tape: Tape


@dataclass(frozen=True, eq=False)
class CustomisedPass(Context):
    """A pass that takes the attention of every edited layer from the tape of a foundation pass.

    Attributes:
        tape: as a foundation pass of the same text, latents and timesteps left it.
        strengths: (K,), the factor on each concept's residual.
        chosen: (B,), which residual of a bank each row has, where the edits are banks (`infusion.training.many`).
    """

    tape: Tape
    strengths: Tensor
    chosen: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StackedPass(Context):
    """Both streams in one pass: R foundation rows, and behind them customised rows that each follow one of these.

    It is the same arithmetic as a foundation pass and a customised pass, in one call of the UNet; for sampling, where
    no gradient has to be kept out of the foundation.

    Attributes:
        gates: (B, K, L), of the last B foundation rows; those before them, the unconditional ones, have no concept.
        rows: (A,), which of the B rows each customised row follows.
        strengths: (K,), the factor on each concept's residual.
        regions: (K, h, w) in [0, 1], where in the latents each concept acts; None is everywhere.
        tape: gets the attention of every edited layer, B rows of it; None keeps nothing.
    """

    gates: Tensor
    rows: Tensor
    strengths: Tensor
    regions: Tensor | None = None
    tape: Tape | None = None


@dataclass(frozen=True, eq=False)
class OwnPass(Context):
    """A single pass whose edited layers attend with their own queries: `A (V + g rᵀ)`, the released code's behaviour.

    Where concepts have residual keys r_K too, A is the map of the keys `K + g r_Kᵀ`.

    Attributes:
        gates: (B, K, L).
        tape: filled by the pass, detached, for the record alone.
        strengths: (K,).
        regions: as of a stacked pass.
    """

    gates: Tensor
    tape: Tape
    strengths: Tensor
    regions: Tensor | None = None


def key_name(layer: str) -> str:
    """What a layer's residual key is called in a concept; its residual value has the layer's name."""
    return f"{layer}.key"


class ResidualValue(nn.Module):
    """r, the residual value embedding of one concept at one layer: float32 (C,), and r_K, the residual key beside it.

    The key is heeded by an `OwnPass` only.

    Args:
        residual, key: see `infusion.deltas.kept`; no residual key with None.
    """

    def __init__(self, residual: Tensor, key: Tensor | None = None):
        super().__init__()
        self.residual = kept(residual)
        self.key = None if key is None else kept(key)

    @classmethod
    def zeros(cls, width: int, keys: bool = False) -> "ResidualValue":
        """A residual to be learned, and a key with `keys`, that do nothing yet."""
        return cls(nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width)) if keys else None)


class EditedCrossAttention(nn.Module):
    """A frozen cross-attention with the residuals of K concepts. What it does is decided by the context of the call:

    - plain `Context`: the base layer, exactly.
    - `FoundationPass`: the base layer's output; its attention goes on the tape.
    - `CustomisedPass`: the taped output plus the gated residuals; no query, no softmax.
    - `StackedPass`: the former for the first rows, the latter for the others.
    - `OwnPass`: the same sum, over attention computed here.

    Nothing is kept on the module between calls.

    Args:
        base: the frozen layer; while it is wrapped, its tensors are called `….base.to_q.weight` and so on.
        name: the layer's name in the UNet, its key on the tape.
        edits: one residual for each of the K concepts.
    """

    def __init__(self, base: CrossAttention, name: str, edits: nn.ModuleList):
        super().__init__()
        self.base = base
        self.name = name
        self.edits = edits

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, N, query_dim) -> (B, N, query_dim).

        Raises:
            ValueError: a customised pass whose tape has no entry for this layer.
        """
        if isinstance(context, FoundationPass):
            out, mass = self.attend(x, context.text, context.gates)
            context.tape[self.name] = out, mass
        elif isinstance(context, CustomisedPass):
            if self.name not in context.tape:
                raise ValueError(f"nothing on the tape for {self.name}: a customised pass follows a foundation pass")
            out = self.blend(*context.tape[self.name], context.strengths, chosen=context.chosen)
        elif isinstance(context, StackedPass):
            first = len(x) - len(context.rows)
            out, mass = self.attend(x[:first], context.text[:first], context.gates)
            conditional = out[first - len(mass) :]
            if context.tape is not None:
                context.tape[self.name] = conditional, mass
            followed = conditional[context.rows], mass[context.rows]
            out = torch.cat([out, self.blend(*followed, context.strengths, context.regions)])
        elif isinstance(context, OwnPass):
            out, mass = self.attend(x, context.text, context.gates, self.keys(context))
            context.tape[self.name] = out.detach(), mass.detach()
            out = self.blend(out, mass, context.strengths, context.regions)
        else:
            return self.base(x, context)
        return self.base.to_out(out)

    def attend(self, x: Tensor, text: Tensor, gates: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attention output `A V` and mass `A g`.

        The output is computed by the base layer's own call, so that the foundation stream is the base model to the bit
        on every machine. Gates as extra channels of the values would save the second softmax over the text tokens (half
        a per cent of a UNet call's arithmetic on SD 1.5), but change the rounding of the output.

        Args:
            x: (R, N, query_dim); text: (R, L, context_dim); gates: (B, K, L), of the last B rows.
            keys: what is added to the text's keys, (R, L, C); None is nothing.

        Returns:
            (R, N, C) before to_out, and (B, K, H, N).
        """
        base, (gated, concepts, _) = self.base, gates.shape
        keyed = base.to_k(text) if keys is None else base.to_k(text) + keys
        q, k, v = base.split(base.to_q(x)), base.split(keyed), base.split(base.to_v(text))  # (B, H, N|L, D)
        out = base.merge(base.attend(q, k, v))
        values = F.pad(gates.to(v.dtype).mT, (0, max(0, base.dim_head - concepts)))  # (B, L, D): fused kernels want D
        mass = base.attend(q[-gated:], k[-gated:], values[:, None].expand(-1, base.heads, -1, -1))  # (B, H, N, D)
        return out, mass[..., :concepts].permute(0, 3, 1, 2)

    def keys(self, context: OwnPass) -> Tensor | None:
        """`Σ_k strength_k g_k ⊗ r_K,k`, (B, L, C): what the concepts add to the text's keys; None without any."""
        if all(edit.key is None for edit in self.edits):
            return None
        keys = [torch.zeros_like(edit.residual) if edit.key is None else edit.key for edit in self.edits]
        keys = torch.stack(keys) * context.strengths[:, None]  # (K, C)
        return torch.einsum("bkl,kc->blc", context.gates.to(keys), keys).to(context.text.dtype)

    def blend(
        self, out: Tensor, mass: Tensor, strengths: Tensor, regions: Tensor | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        """`out + Σ_k strength_k (m_k a_k) ⊗ r_k`, with the regions m_k at this layer's size.

        (B, N, C), (B, K, H, N), (K,), (K, h, w), (B,) -> (B, N, C).
        """
        residuals = [edit.residual if chosen is None else edit.residuals[chosen] for edit in self.edits]
        residuals = torch.stack(residuals, -2) * strengths[:, None]  # (K, C) | (B, K, C)
        residuals = residuals.to(mass.dtype).unflatten(-1, (self.base.heads, -1))  # (K, H, D) | (B, K, H, D)
        if regions is not None:
            mass = mass * shrink(regions, mass.shape[-1]).to(mass.dtype)[:, None]  # (K, 1, N)
        return out + torch.einsum("...khn,...khd->...nhd", mass, residuals).flatten(2).to(out.dtype)


@torch.no_grad()
def residual_share(out: Tensor, mass: Tensor, residuals: Tensor) -> Tensor:
    """‖Σ_k a_k ⊗ r_k‖ / ‖out_F‖ of each row: how large the edit is beside what it is added to.

    The Gram matrices of mass and residuals give the norm without forming the sum.

    Args:
        out: (B, N, C), mass: (B, K, H, N), as on the tape. residuals: (K, C).

    Returns:
        (B,) float32.
    """
    mass = mass.float()
    residuals = residuals.float().unflatten(1, (mass.shape[2], -1))  # (K, H, D)
    overlap = torch.einsum("bkhn,bjhn->bhkj", mass, mass)
    gram = torch.einsum("khd,jhd->hkj", residuals, residuals)
    squared = (overlap * gram).sum(dim=(1, 2, 3)).clamp(min=0)  # (B,)
    return squared.sqrt() / out.float().flatten(1).norm(dim=1).clamp(min=1e-12)
