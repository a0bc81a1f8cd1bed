"""The network behind the judges of the pocket world: convolutions, then a small transformer with tokens that ask."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (48, 96, 160)  # at 32, 16 and 8 pixels


class Residual(nn.Module):
    """Two convolutions and a residual sum: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Eye(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> answers (B, questions, 160), one for each learned token that asks."""

    width = WIDTHS[-1]

    def __init__(self, questions: int, layers: int = 3, heads: int = 4):
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 4, stride=2, padding=1)]
        for width, wider in pairwise(WIDTHS):
            blocks += [nn.SiLU(), nn.Conv2d(width, wider, 3, stride=2, padding=1), Residual(wider)]
        self.convolutions = nn.Sequential(*blocks)
        self.places = nn.Parameter(0.02 * torch.randn(64, self.width))
        self.questions = nn.Parameter(0.02 * torch.randn(questions, self.width))
        layer = nn.TransformerEncoderLayer(
            self.width, heads, 4 * self.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, nn.LayerNorm(self.width), enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.convolutions(images).flatten(2).transpose(1, 2) + self.places  # (B, 64, 160)
        tokens = torch.cat([self.questions.expand(len(images), -1, -1), patches], 1)
        return self.transformer(tokens)[:, : len(self.questions)]


def spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """Slight blur for a third of the images, slight noise for all, as samples of a model have them; same shape."""
    count = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.35)
    noise = torch.randn(images.shape, generator=generator)
    strength = 0.08 * torch.rand(count, 1, 1, 1, generator=generator) ** 2
    return (images + share.to(images) * (blurred - images) + (strength * noise).to(images)).clamp(-1, 1)
