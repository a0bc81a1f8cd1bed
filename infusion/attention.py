"""The two streams: foundation rows whose attention is recorded, and customised rows that are steered by it.

Legend for shapes: B batch, N image tokens, L text tokens, K concepts, H heads, D head width, C = H·D.

The customised stream is `A_F (V + g rᵀ)`, with the attention map A_F of the foundation stream and a residual value
embedding r in each layer (Zeng et al. 2024, arXiv 2404.14007; equations are numbered as in docs/method.md). Both
streams read the same text, so `A_F V` is the foundation's own output and the edit is a rank-one addition (eq. 1),
`out_F + a ⊗ r`, with the attention mass `a = A_F g`. A customised stream therefore needs no query, no softmax and no
backward pass through an attention.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from infusion.deltas import as_parameter
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

    def attend(self, layer: "EditedCrossAttention", x: Tensor) -> Tensor:
        out, mass = layer.attention(x, self, self.gates)
        self.tape[layer.name] = out, mass
        return layer.base.to_out(out)


@dataclass(frozen=True, eq=False)
class CustomisedPass(Context):
    """A pass that takes the attention of every edited layer from the tape of a foundation pass: no query, no softmax.

    Attributes:
        tape: as a foundation pass of the same text, latents and timesteps left it.
        strengths: (K,), the factor on each concept's residual.
    """

    tape: Tape
    strengths: Tensor

    def attend(self, layer: "EditedCrossAttention", x: Tensor) -> Tensor:
        """Raises ValueError where the tape has no entry for this layer."""
        if layer.name not in self.tape:
            raise ValueError(f"nothing on the tape for {layer.name}: a customised pass follows a foundation pass")
        out, mass = self.tape[layer.name]
        return layer.base.to_out(layer.blend(out, mass, self.residuals(layer)))

    def residuals(self, layer: "EditedCrossAttention") -> Tensor:
        """Each concept's residual times its strength, (K, C); (B, K, C) where rows have residuals of their own."""
        return layer.residuals(self.strengths)


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

    def attend(self, layer: "EditedCrossAttention", x: Tensor) -> Tensor:
        first = len(x) - len(self.rows)
        out, mass = layer.attention(x[:first], self.map(lambda rows: rows[:first]), self.gates)
        conditional = out[first - len(mass) :]
        if self.tape is not None:
            self.tape[layer.name] = conditional, mass
        residuals = layer.residuals(self.strengths)
        customised = layer.blend(conditional[self.rows], mass[self.rows], residuals, self.regions)
        return layer.base.to_out(torch.cat([out, customised]))


@dataclass(frozen=True, eq=False)
class OwnPass(Context):
    """A single pass whose edited layers attend with their own queries: `A (V + g rᵀ)`, as in the released code.

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

    def attend(self, layer: "EditedCrossAttention", x: Tensor) -> Tensor:
        out, mass = layer.attention(x, self, self.gates, self.keys(layer))
        self.tape[layer.name] = out.detach(), mass.detach()
        return layer.base.to_out(layer.blend(out, mass, layer.residuals(self.strengths), self.regions))

    def keys(self, layer: "EditedCrossAttention") -> Tensor | None:
        """`Σ_k strength_k g_k ⊗ r_K,k`, (B, L, C): what the concepts add to the text's keys; None without any."""
        if all(edit.key is None for edit in layer.edits):
            return None
        keys = [torch.zeros_like(edit.residual) if edit.key is None else edit.key for edit in layer.edits]
        keys = torch.stack(keys) * self.strengths[:, None]  # (K, C)
        return torch.einsum("bkl,kc->blc", self.gates.to(keys), keys).to(self.text.dtype)


def key_name(layer: str) -> str:
    """What a layer's residual key is called in a concept; its residual value has the layer's name."""
    return f"{layer}.key"


class ResidualValue(nn.Module):
    """r, the residual value embedding of one concept at one layer: float32 (C,), and r_K, the residual key beside it.

    Only an `OwnPass` uses the key.

    Args:
        residual, key: see `infusion.deltas.as_parameter`; no residual key with None.
    """

    def __init__(self, residual: Tensor, key: Tensor | None = None):
        super().__init__()
        self.residual = as_parameter(residual)
        self.key = None if key is None else as_parameter(key)


class EditedCrossAttention(nn.Module):
    """A frozen cross-attention with the residuals of K concepts. The context of a call decides what it does with them.

    Under a plain `Context` it is the base layer, exactly. Nothing is kept on the module between calls.

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
        """(B, N, query_dim) -> (B, N, query_dim)."""
        return context.at(self.name).attend(self, x)

    def attention(
        self, x: Tensor, context: Context, gates: Tensor, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention output `A V` and mass `a = A g` (eq. 1), with the map `A = softmax(Q Kᵀ / √D)`.

        The output is computed by the base layer's own call, so that the foundation stream equals the base model bit for
        bit on every machine. Gates as extra channels of the values would save the second softmax over the text tokens
        (half a per cent of a UNet call's arithmetic on SD 1.5), but change the rounding of the output.

        Args:
            x: (R, N, query_dim); context: its text is (R, L, context_dim); gates: (B, K, L), of the last B rows.
            keys: what is added to the text's keys, (R, L, C); None is nothing.

        Returns:
            (R, N, C) before to_out, and (B, K, H, N).
        """
        base, (gated, concepts, _) = self.base, gates.shape
        text, attended = context.text, context.attended
        keyed = base.to_k(text) if keys is None else base.to_k(text) + keys
        q, k, v = base.split(base.to_q(x)), base.split(keyed), base.split(base.to_v(text))  # (R, H, N|L, D)
        out = base.merge(base.attend(q, k, v, attended))
        values = repeat(gates.to(v.dtype), "b k l -> b h l k", h=base.heads)
        values = F.pad(values, (0, max(0, base.dim_head - concepts)))  # (B, H, L, D): fused kernels want D
        attended = None if attended is None else attended[-gated:]
        mass = base.attend(q[-gated:], k[-gated:], values, attended)  # (B, H, N, D)
        return out, rearrange(mass[..., :concepts], "b h n k -> b k h n")

    def residuals(self, strengths: Tensor) -> Tensor:
        """Each concept's residual times its strength: (K,) -> (K, C)."""
        return torch.stack([edit.residual for edit in self.edits]) * strengths[:, None]

    def blend(self, out: Tensor, mass: Tensor, residuals: Tensor, regions: Tensor | None = None) -> Tensor:
        """`out_F + Σ_k (m_k a_k) ⊗ r_k` (eq. 2), the customised stream, with the regions m_k at this layer's size.

        (B, N, C), (B, K, H, N), (K, C) or (B, K, C), (K, h, w) -> (B, N, C).
        """
        residuals = rearrange(residuals.to(mass.dtype), "... k (h d) -> ... k h d", h=self.base.heads)
        if regions is not None:
            mass = mass * shrink(regions, mass.shape[-1]).to(mass.dtype)[:, None]  # (K, 1, N)
        added = torch.einsum("...khn,...khd->...nhd", mass, residuals)
        return out + rearrange(added, "b n h d -> b n (h d)").to(out.dtype)


@torch.no_grad()
def residual_share(out: Tensor, mass: Tensor, residuals: Tensor) -> Tensor:
    """‖Σ_k a_k ⊗ r_k‖ / ‖out_F‖ of each row: how large the edit is beside what it is added to.

    Args:
        out: (B, N, C), mass: (B, K, H, N), as on the tape. residuals: (K, C).

    Returns:
        (B,) float32.
    """
    residuals = rearrange(residuals.float(), "k (h d) -> k h d", h=mass.shape[2])
    added = torch.einsum("bkhn,khd->bnhd", mass.float(), residuals)
    return added.flatten(1).norm(dim=1) / out.float().flatten(1).norm(dim=1).clamp(min=1e-12)
