"""Stable Diffusion's KL autoencoder (Rombach et al. 2022, arXiv 2112.10752), under its checkpoints' tensor names."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import normalise, pixels, tokens
from ldm.models.unet import Upsample


class ResnetBlock(nn.Module):
    """Two convolutions and a residual sum: (B, C, h, w) -> (B, out_channels, h, w)."""

    def __init__(self, channels: int, out_channels: int, norm_groups: int = 32):
        super().__init__()
        self.norm1 = normalise(channels, eps=1e-6, groups=norm_groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = normalise(out_channels, eps=1e-6, groups=norm_groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Single-head self-attention over pixels with a residual sum: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int, norm_groups: int = 32):
        super().__init__()
        self.norm = normalise(channels, eps=1e-6, groups=norm_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (tokens(conv(h))[:, None] for conv in (self.q, self.k, self.v))  # (B, 1, N, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, N, C)
        return x + self.proj_out(pixels(h, x.shape[2:]))


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2); the padding is on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def level(channels: int, out_channels: int, blocks: int, norm_groups: int, **resample: nn.Module) -> nn.Sequential:
    """`blocks` residual blocks at one size, then the resampling layer, if any, under the name it is given."""
    widths = [channels] + [out_channels] * blocks
    block = nn.Sequential(*(ResnetBlock(a, b, norm_groups) for a, b in pairwise(widths)))
    return nn.Sequential(OrderedDict(block=block, **resample))


def middle(channels: int, attention: bool, norm_groups: int) -> nn.Sequential:
    """The coarsest level: residual block, attention if asked for, residual block."""
    return nn.Sequential(
        OrderedDict(
            block_1=ResnetBlock(channels, channels, norm_groups),
            attn_1=AttnBlock(channels, norm_groups) if attention else nn.Identity(),
            block_2=ResnetBlock(channels, channels, norm_groups),
        )
    )


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) -> (B, 2·z_channels, H/f, W/f); arguments as for `AutoencoderKL`."""

    def __init__(
        self,
        in_channels: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        attention: bool,
        norm_groups: int = 32,
    ):
        super().__init__()
        widths = [ch] + [ch * multiple for multiple in ch_mult]  # what goes into each level, finest first; and out
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.Sequential()
        for i in range(len(ch_mult)):
            last = i == len(ch_mult) - 1
            resample = {} if last else {"downsample": Downsample(widths[i + 1])}
            self.down.append(level(widths[i], widths[i + 1], num_res_blocks, norm_groups, **resample))
        self.mid = middle(widths[-1], attention, norm_groups)
        self.norm_out = normalise(widths[-1], eps=1e-6, groups=norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.mid(self.down(self.conv_in(images)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> images (B, out_ch, f·h, f·w); arguments as for `AutoencoderKL`."""

    def __init__(
        self,
        out_ch: int,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        attention: bool,
        norm_groups: int = 32,
    ):
        super().__init__()
        widths = [ch * multiple for multiple in ch_mult] + [ch * ch_mult[-1]]  # what goes out of each level; and in
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], attention, norm_groups)
        self.up = nn.ModuleList()  # finest first, run backwards
        for i in range(len(ch_mult)):
            resample = {} if i == 0 else {"upsample": Upsample(widths[i])}
            self.up.append(level(widths[i + 1], widths[i], num_res_blocks + 1, norm_groups, **resample))
        self.norm_out = normalise(widths[0], eps=1e-6, groups=norm_groups)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            h = stage(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Images to latents of about unit variance, and back.

    Args:
        ch: width at the finest level.
        ch_mult: width of each level as a multiple of `ch`; every level but the last halves the size.
        num_res_blocks: residual blocks a level in the encoder (one more in the decoder).
        z_channels: channels of the encoder's bottleneck.
        embed_dim: channels of the latents.
        in_channels, out_ch: image channels in and out.
        mid_attention: attention at the coarsest level, as in Stable Diffusion.
        norm_groups: groups of every GroupNorm; fewer where a width has no such divisor.
        scale_factor: what latents are multiplied by so that a UNet sees unit variance.

    Attributes:
        factor: the ratio of image size to latent size.
        embed_dim: channels of the latents.
    """

    def __init__(
        self,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        z_channels: int = 4,
        embed_dim: int = 4,
        in_channels: int = 3,
        out_ch: int = 3,
        mid_attention: bool = True,
        norm_groups: int = 32,
        scale_factor: float = 0.18215,
    ):
        super().__init__()
        self.factor = 2 ** (len(ch_mult) - 1)
        self.embed_dim = embed_dim
        self.scale_factor = scale_factor
        self.encoder = Encoder(in_channels, ch, ch_mult, num_res_blocks, z_channels, mid_attention, norm_groups)
        self.decoder = Decoder(out_ch, ch, ch_mult, num_res_blocks, z_channels, mid_attention, norm_groups)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, unscaled.

        Args:
            images: (B, in_channels, H, W) in [-1, 1], H and W divisible by `self.factor`.

        Returns:
            Two tensors (B, embed_dim, H / factor, W / factor); the log-variance is clamped to [-30, 20].

        Raises:
            ValueError: if H or W is not divisible by `self.factor`.
        """
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise ValueError(f"images of shape {tuple(images.shape)}: sides must be divisible by {self.factor}")
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents of images: the posterior's mean, or a draw from it.

        Args:
            images: (B, in_channels, H, W) in [-1, 1].
            sample: draw from the posterior.
            generator: source of that draw, on any device.

        Returns:
            (B, embed_dim, H / factor, W / factor).

        Raises:
            ValueError: if H or W is not divisible by `self.factor`.
        """
        mean, logvar = self.moments(images)
        if sample:
            device = mean.device if generator is None else generator.device
            noise = torch.randn(mean.shape, generator=generator, device=device, dtype=torch.float32).to(mean)
            mean = mean + (0.5 * logvar).exp() * noise
        return self.scale_factor * mean

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, embed_dim, h, w) -> images (B, out_ch, factor·h, factor·w), about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(latents / self.scale_factor))


def coverage(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (N, 1, H, W) in [0, 1] as shares of the places of latents that they cover, (N, 1, h, w): the area's mean.

    All masks come to the size of latents by this rule.

    Args:
        size: (h, w).
    """
    return F.adaptive_avg_pool2d(masks, tuple(size))
