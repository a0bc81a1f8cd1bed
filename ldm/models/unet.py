"""Stable Diffusion's UNet (Rombach et al. 2022, arXiv 2112.10752), under the tensor names of its checkpoints."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ldm.models.attention import Context, SpatialTransformer, normalise, zeroed
from ldm.util.cli import UserError

SIZES, SIZE_FEATURES = 6, 256  # integers that SDXL conditions on, and sinusoids of each


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of the timestep, cosines first: (B,) -> float32 (B, dim), dim even (Vaswani et al. 2017)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def size_embedding(sizes: Tensor) -> Tensor:
    """Sinusoids of each of S integers, (B, S) int64 -> float32 (B, S·256); bfloat16 has no 1023 (SDXL, section 2.2)."""
    return timestep_embedding(sizes.flatten(), SIZE_FEATURES).unflatten(0, sizes.shape).flatten(1)


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, ⌈h/2⌉, ⌈w/2⌉) by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, 2h, 2w) by repetition and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """Two convolutions with the timestep added in between; the residual branch starts at zero."""

    def __init__(self, channels: int, time_dim: int, out_channels: int, norm_groups: int = 32):
        super().__init__()
        self.in_layers = nn.Sequential(
            normalise(channels, eps=1e-5, groups=norm_groups),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out_channels))
        self.out_layers = nn.Sequential(
            normalise(out_channels, eps=1e-5, groups=norm_groups),
            nn.SiLU(),
            nn.Dropout(0.0),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, C, h, w) and (B, time_dim) -> (B, out_channels, h, w)."""
        h = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Block(nn.Sequential):
    """Layers in a row, each given what it takes besides the feature map: the timestep, the context, or nothing."""

    def forward(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, time)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Predicts the noise (or v) in latents from a timestep and a text.

    Args:
        in_channels, out_channels: latent channels in and out.
        model_channels: width at the finest level.
        channel_mult: width of each level as a multiple of `model_channels`; every level but the last halves the size.
        num_res_blocks: residual blocks a level on the way down (one more on the way up).
        attention_resolutions: the downsampling factors (1, 2, 4, …) at which there is a transformer;
            the middle block always has one.
        num_heads: heads of every attention layer (SD 1); exclusive with `num_head_channels`.
        num_head_channels: width of every head (SD 2).
        context_dim: width of the text encodings.
        transformer_depth: transformer blocks in each transformer; a list has one number for each level, finest first,
            and the middle block has the last one (SDXL).
        use_linear: linear projections around the transformers (SD 2) instead of 1×1 convolutions (SD 1).
        upcast_attention: attention in float32 (SD 2.1 768).
        checkpoint: recompute each block in the backward pass instead of storing its activations; an attribute of
            the same name switches it later.
        norm_groups: groups of every GroupNorm; fewer where a width has no such divisor.
        pooled_dim: width of the context's `pooled`, which conditions the time embedding together with its `sizes`
            (SDXL: Podell et al. 2023, arXiv 2307.01952, section 2.2); None takes neither.
        pixels: side of the square of pixels that a latent stands for; used where the context has no sizes.

    Attributes:
        factor: the ratio of the finest level's size to the coarsest's; sides of latents must be divisible by it.
        widths, heads, depths, attends: of each level, its channels, the heads and blocks of its transformers, and
            whether it has some.

    Raises:
        ValueError: unless exactly one of `num_heads` and `num_head_channels` is given and divides every width; a list
            of depths that has not one for each level.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        model_channels: int = 320,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (4, 2, 1),
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        context_dim: int = 768,
        transformer_depth: int | Sequence[int] = 1,
        use_linear: bool = False,
        upcast_attention: bool = False,
        checkpoint: bool = False,
        norm_groups: int = 32,
        pooled_dim: int | None = None,
        pixels: int = 8,
    ):
        super().__init__()
        divisor = num_head_channels if num_heads is None else num_heads
        if (num_heads is None) == (num_head_channels is None) or divisor < 1:
            raise UserError(f"give exactly one of num_heads and num_head_channels: {num_heads=}, {num_head_channels=}")
        self.model_channels, self.context_dim, self.checkpoint = model_channels, context_dim, checkpoint
        self.widths = [multiple * model_channels for multiple in channel_mult]
        self.heads = [num_heads or width // num_head_channels for width in self.widths]
        levels = range(len(channel_mult))
        self.attends = [2**level in attention_resolutions for level in levels]
        self.factor = 2 ** levels[-1]
        self.pooled_dim, self.pixels = pooled_dim, pixels
        depths = [transformer_depth] * len(levels) if isinstance(transformer_depth, int) else transformer_depth
        self.num_res_blocks, self.depths = num_res_blocks, tuple(depths)
        if len(self.depths) != len(levels):
            raise UserError(f"transformer_depth: {len(self.depths)} numbers for {len(levels)} levels (channel_mult)")
        time_dim = 4 * model_channels

        def transformer(level: int) -> SpatialTransformer:
            channels = self.widths[level]
            if channels % divisor:
                raise UserError(f"{channels} channels do not divide into heads: {num_heads=}, {num_head_channels=}")
            heads, depth = self.heads[level], self.depths[level]
            return SpatialTransformer(
                channels, heads, channels // heads, context_dim, depth, use_linear, upcast_attention, norm_groups
            )

        def residual(channels: int, level: int) -> list[nn.Module]:
            """Layers from so many channels to the level's width."""
            block = ResBlock(channels, time_dim, self.widths[level], norm_groups)
            return [block, transformer(level)] if self.attends[level] else [block]

        self.time_embed = nn.Sequential(nn.Linear(model_channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.label_emb = None
        if pooled_dim is not None:
            first = nn.Linear(pooled_dim + SIZES * SIZE_FEATURES, time_dim)
            self.label_emb = nn.Sequential(nn.Sequential(first, nn.SiLU(), nn.Linear(time_dim, time_dim)))

        channels = model_channels
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(in_channels, channels, 3, padding=1))])
        skips = [channels]  # widths of the feature maps that the way up takes back
        for level in levels:
            for _ in range(num_res_blocks):
                self.input_blocks.append(Block(*residual(channels, level)))
                channels = self.widths[level]
                skips.append(channels)
            if level < levels[-1]:
                self.input_blocks.append(Block(Downsample(channels)))
                skips.append(channels)

        self.middle_block = Block(
            ResBlock(channels, time_dim, channels, norm_groups),
            transformer(levels[-1]),
            ResBlock(channels, time_dim, channels, norm_groups),
        )

        self.output_blocks = nn.ModuleList()
        for level in reversed(levels):
            for i in range(num_res_blocks + 1):
                layers = residual(channels + skips.pop(), level)
                channels = self.widths[level]
                if level > 0 and i == num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(
            normalise(channels, eps=1e-5, groups=norm_groups),
            nn.SiLU(),
            zeroed(nn.Conv2d(channels, out_channels, 3, padding=1)),
        )

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor | Context) -> Tensor:
        """The model's prediction for noisy latents.

        Args:
            latents: (B, in_channels, h, w), h and w divisible by `self.factor`.
            timesteps: (B,), in [0, 1000).
            context: text encodings (B, L, context_dim), or a `Context` that holds them; it reaches every
                cross-attention layer as it is.

        Returns:
            (B, out_channels, h, w).

        Raises:
            ValueError: if h or w is not divisible by `self.factor`, or if the context lacks the pooled vector that the
                UNet takes, or has one that it does not take.
        """
        if latents.shape[2] % self.factor or latents.shape[3] % self.factor:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: sides must be divisible by {self.factor}")
        if not isinstance(context, Context):
            context = Context(context)
        time = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(latents.dtype))  # (B, time_dim)
        if (self.label_emb is None) != (context.pooled is None):
            lacks = "no" if context.pooled is None else "a"
            raise ValueError(f"the context has {lacks} pooled vector, unlike the UNet")
        if self.label_emb is not None:
            time = time + self.label_emb(self._vector(latents, context))
        h, skips = latents, []
        for block in self.input_blocks:
            h = self._run(block, h, time, context)
            skips.append(h)
        h = self._run(self.middle_block, h, time, context)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), time, context)
        return self.out(h)

    def _vector(self, latents: Tensor, context: Context) -> Tensor:
        """What the time embedding is conditioned on beside the timestep: (B, pooled_dim + 6·256)."""
        sizes = context.sizes
        if sizes is None:
            height, width = (self.pixels * side for side in latents.shape[2:])
            sizes = torch.zeros(len(latents), SIZES, dtype=torch.int64, device=latents.device)
            sizes[:, 0::4], sizes[:, 1::4] = height, width  # of the photo and of its crop, without a copy to the device
        return torch.cat([context.pooled, size_embedding(sizes).to(context.pooled.dtype)], dim=1).to(latents.dtype)

    def _run(self, block: Block, x: Tensor, time: Tensor, context: Context) -> Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            return recompute(block, x, time, context, use_reentrant=False)
        return block(x, time, context)
