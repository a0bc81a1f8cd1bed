"""Attention of Stable Diffusion's UNet, under the tensor names of the latent-diffusion checkpoints.

Legend for shapes: B batch, N image tokens, L text tokens, H heads, D head width, C = H·D.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def normalise(channels: int, eps: float, groups: int = 32) -> nn.GroupNorm:
    """GroupNorm of `groups` groups, or of as many as divide both that and `channels`.

    A group of one or two channels forgets how bright its channel is: narrow models need fewer groups than 32.
    """
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=eps)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all its parameters set to zero: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def tokens(x: Tensor) -> Tensor:
    """Pixels as a sequence: (B, C, h, w) -> (B, h·w, C), laid out so that nothing that follows has to copy it."""
    return rearrange(x, "b c h w -> b (h w) c").contiguous()


def pixels(x: Tensor, size: torch.Size) -> Tensor:
    """The inverse of `tokens`, given (h, w): (B, h·w, C) -> (B, C, h, w)."""
    return rearrange(x, "b (h w) c -> b c h w", h=size[0]).contiguous()


def cat_texts(texts: Sequence[Tensor]) -> Tensor:
    """Encodings (B, L, D), or a value of each token, (B, L), one below the other; shorter rows end in zeros."""
    length = max(text.shape[1] for text in texts)
    return torch.cat([F.pad(text, (0, 0) * (text.dim() - 2) + (0, length - text.shape[1])) for text in texts])


@dataclass(frozen=True, eq=False)
class Context:
    """What one UNet call hands to every cross-attention layer, untouched by the UNet itself.

    A method that customises the model subclasses it: to carry data of its own, and to attend otherwise in the layers
    that it has wrapped.

    Attributes:
        text: encodings of the prompts, float (B, L, D_text).
        attended: bool (B, L), the tokens that count; the others fill up rows that are shorter than the longest. None:
            all of them.
        pooled: one vector for each prompt, (B, P), which conditions SDXL's time embedding; None for other models.
        sizes: six integers for each image, (B, 6) int64, which do so too: height and width of the photo before it was
            resized, top and left of the crop after that, height and width of the crop, in pixels. None: a whole picture
            of the latents' size. Other models do not heed them.
        texts: a spatial transformer's name in the UNet -> what wrapped layers in it read in place of `text`, of its
            shape; all transformers or none.
    """

    text: Tensor
    attended: Tensor | None = field(default=None, kw_only=True)
    pooled: Tensor | None = field(default=None, kw_only=True)
    sizes: Tensor | None = field(default=None, kw_only=True)
    texts: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    def becomes(self, kind: "type[C]", **fields: Any) -> "C":
        """The same conditioning for a pass of another kind, which has these fields besides."""
        own = {"attended": self.attended, "pooled": self.pooled, "sizes": self.sizes, "texts": self.texts}
        return kind(text=self.text, **own, **fields)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """With every tensor of the conditioning changed alike, such as `lambda rows: rows[2:]`."""
        given = {"text": self.text, "attended": self.attended, "pooled": self.pooled, "sizes": self.sizes}
        changed = {name: change(tensor) for name, tensor in given.items() if tensor is not None}
        return replace(self, **changed, texts={name: change(text) for name, text in self.texts.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """On another device, and of another dtype; integers stay integers."""
        return self.map(lambda rows: rows.to(device, dtype if rows.is_floating_point() else None))

    @staticmethod
    def cat(contexts: "Sequence[Context]") -> "Context":
        """The rows of contexts of one model, one below the other; what fills up shorter texts is not attended to."""
        columns = ([getattr(c, name) for c in contexts] for name in ("pooled", "sizes"))
        pooled, sizes = (None if rows[0] is None else torch.cat(rows) for rows in columns)
        text, attended = cat_texts([context.text for context in contexts]), None
        if any(c.attended is not None or c.text.shape[1] < text.shape[1] for c in contexts):
            every = (c.text.new_ones(c.text.shape[:2], dtype=torch.bool) for c in contexts)
            counted = zip(every, contexts, strict=True)
            attended = cat_texts([own if c.attended is None else c.attended for own, c in counted])
        names = dict.fromkeys(name for context in contexts for name in context.texts)
        own = {name: [c.texts[name] if c.texts else c.text for c in contexts] for name in names}
        texts = {name: cat_texts(rows) for name, rows in own.items()}
        return Context(text, attended=attended, pooled=pooled, sizes=sizes, texts=texts)

    def at(self, layer: str) -> Self:
        """As one wrapped layer reads it, by the layer's name in the UNet: `text` is what is for this layer."""
        return replace(self, text=self.texts[transformer_of(layer)], texts={}) if self.texts else self

    def attend(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What a wrapped layer gives for image tokens, (B, N, D) -> (B, N, D): here what the frozen one in it gives.

        Args:
            layer: it holds the frozen `CrossAttention` as `base`.
        """
        return layer.base(x, self)


C = TypeVar("C", bound=Context)


def transformer_of(layer: str) -> str:
    """The spatial transformer that a cross-attention lies in, both by their names in the UNet."""
    return layer.partition(".transformer_blocks.")[0]


class CrossAttention(nn.Module):
    """Multi-head attention of image tokens over text tokens, or over themselves when no context is given.

    Args:
        query_dim: width of the image tokens.
        context_dim: width of the text tokens; None for self-attention.
        heads: number of heads.
        dim_head: width of a head.
        upcast: compute logits, softmax and sum in float32 whatever the precision around (SD 2.1 768 overflows fp16).
    """

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, upcast: bool = False
    ):
        super().__init__()
        inner = heads * dim_head
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.dim_head = dim_head
        self.upcast = upcast
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(0.0))

    def split(self, t: Tensor) -> Tensor:
        """(B, N, H·D) -> (B, H, N, D)."""
        return rearrange(t, "b n (h d) -> b h n d", h=self.heads)

    def merge(self, t: Tensor) -> Tensor:
        """(B, H, N, D) -> (B, N, H·D)."""
        return rearrange(t, "b h n d -> b n (h d)")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attended: Tensor | None = None) -> Tensor:
        """softmax(q kᵀ / √D) v, with v of any width: (B, H, N, D), (B, H, L, D), (B, H, L, E) -> (B, H, N, E).

        The softmax is over the tokens of k that are `attended`, bool (B, L); None is all.
        """
        mask = None if attended is None else attended[:, None, None]  # (B, 1, 1, L)
        if not self.upcast:
            return F.scaled_dot_product_attention(q, k, v, mask)
        with torch.autocast(q.device.type, enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(v.dtype)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """Args: x (B, N, query_dim) and a context whose text is (B, L, context_dim). Returns (B, N, query_dim)."""
        source, attended = (x, None) if context is None else (context.text, context.attended)
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(source)), self.split(self.to_v(source))
        return self.to_out(self.merge(self.attend(q, k, v, attended)))


class GEGLU(nn.Module):
    """Gated linear unit with an exact GELU as its gate (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The transformer's MLP, four times as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, MLP; each behind a LayerNorm and a residual sum."""

    def __init__(self, dim: int, heads: int, dim_head: int, context_dim: int, upcast: bool = False):
        super().__init__()
        self.attn1 = CrossAttention(dim, None, heads, dim_head, upcast)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head, upcast)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn1(self.norm1(x))  # (B, N, dim)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, as a residual branch that starts at zero.

    Args:
        channels: width of the feature map.
        heads, dim_head: the attention's heads; the blocks are heads·dim_head wide.
        context_dim: width of the text tokens.
        depth: number of transformer blocks.
        use_linear: project with linear layers (SD 2) instead of 1×1 convolutions (SD 1).
        upcast: attention in float32.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        dim_head: int,
        context_dim: int,
        depth: int = 1,
        use_linear: bool = False,
        upcast: bool = False,
        norm_groups: int = 32,
    ):
        super().__init__()
        inner = heads * dim_head
        self.use_linear = use_linear
        self.norm = normalise(channels, eps=1e-6, groups=norm_groups)
        self.proj_in = nn.Linear(channels, inner) if use_linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, heads, dim_head, context_dim, upcast) for _ in range(depth)
        )
        self.proj_out = zeroed(nn.Linear(inner, channels) if use_linear else nn.Conv2d(inner, channels, 1))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        h = self.norm(x)
        h = self.proj_in(tokens(h)) if self.use_linear else tokens(self.proj_in(h))  # (B, N, inner) with N = h·w
        for block in self.transformer_blocks:
            h = block(h, context)
        size = x.shape[2:]
        h = pixels(self.proj_out(h), size) if self.use_linear else self.proj_out(pixels(h, size))
        return x + h
