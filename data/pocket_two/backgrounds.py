"""Smooth backgrounds of the pocket world: waves, gradients, bricks, planks. Nothing varies at the scale of a pixel.

Each painter takes coordinates x, y in [0, 1], shape (B, s, s), and random numbers u in [0, 1], shape (B, 6, 1, 1), and
returns a tone in [0, 1], shape (B, s, s), that runs through the background's colours. A cartoon's tone is cut to three
flat steps.
"""

import numpy as np
import torch
from torch import Tensor

# name -> words of a caption
BACKGROUNDS = {"grass": "on grass", "sand": "on sand", "snow": "on snow", "water": "on water",
               "bricks": "on a brick wall",
               "wood": "on a wooden floor", "night": "in the night sky", "fabric": "on pink fabric"}  # fmt: skip

# name -> colours at tone 0, 1/2 and 1
PALETTES = {
    "grass": ((0.22, 0.48, 0.12), (0.40, 0.66, 0.20), (0.58, 0.80, 0.34)),
    "sand": ((0.70, 0.56, 0.34), (0.85, 0.73, 0.50), (0.96, 0.88, 0.68)),
    "snow": ((0.68, 0.78, 0.90), (0.84, 0.90, 0.96), (0.97, 0.98, 1.0)),
    "water": ((0.05, 0.34, 0.55), (0.14, 0.54, 0.72), (0.45, 0.78, 0.88)),
    "bricks": ((0.86, 0.80, 0.74), (0.70, 0.34, 0.24), (0.60, 0.24, 0.17)),
    "wood": ((0.32, 0.18, 0.09), (0.55, 0.35, 0.19), (0.68, 0.46, 0.27)),
    "night": ((0.05, 0.05, 0.18), (0.13, 0.12, 0.36), (0.95, 0.93, 0.72)),
    "fabric": ((0.78, 0.40, 0.55), (0.92, 0.60, 0.72), (1.0, 0.80, 0.87)),
}


def wave(phase: Tensor) -> Tensor:
    return 0.5 + 0.5 * torch.sin(2 * torch.pi * phase)


def grass(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    hills = wave((1 + u[:, 0]) * x + 0.3 * wave(2 * y + u[:, 1]) + u[:, 2])
    return 0.65 * y + 0.35 * hills


def sand(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    return wave((3 + u[:, 0]) * y + 0.35 * wave((0.8 + u[:, 1]) * x + u[:, 2]) + u[:, 3])


def snow(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    hill = 0.35 + 0.3 * u[:, 0] + 0.12 * torch.sin(2 * torch.pi * ((0.6 + u[:, 1]) * x + u[:, 2]))
    return torch.sigmoid((y - hill) * 14) * (0.75 + 0.25 * y) + 0.1 * (1 - y)


def water(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    ripple = wave((4 + u[:, 0]) * y + 0.25 * wave((1.5 + u[:, 1]) * x + u[:, 2]) + u[:, 3])
    return 0.2 + 0.7 * ripple * wave((1 + u[:, 4]) * x + 1.5 * y + u[:, 5])


def bricks(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    row = y * 5 + u[:, 0]
    column = x * 3 + 0.5 * (row.floor() % 2) + u[:, 1]
    edge = torch.minimum((row % 1 - 0.5).abs().neg() + 0.5, ((column % 1 - 0.5).abs().neg() + 0.5) * 1.6)
    return (0.5 + 0.2 * wave(column.floor() * 0.37 + row.floor() * 0.61 + u[:, 2])) * ((edge - 0.05) * 14).clamp(0, 1)


def wood(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    plank = x * 4 + u[:, 0]
    gap = ((0.5 - (plank % 1 - 0.5).abs()) * 12).clamp(0, 1)
    grain = wave((1 + u[:, 1]) * y + 0.2 * wave(plank) + plank.floor() * 0.37 + u[:, 2])
    return gap * (0.35 + 0.3 * wave(plank.floor() * 0.29 + u[:, 3]) + 0.3 * grain)


def night(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    sky = 0.5 * y
    for star in range(3):  # two stars and a moon, anywhere
        radius = 0.09 if star == 0 else 0.028
        distance = ((x - u[:, 2 * star]) ** 2 + (y - u[:, 2 * star + 1]) ** 2).sqrt()
        sky = torch.maximum(sky, ((radius - distance) * 40 + 0.5).clamp(0, 1))
    return sky


def fabric(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
    slant = (1.2 + u[:, 0]) * x + (0.6 + u[:, 1]) * y
    return wave(slant + 0.3 * wave((1 + u[:, 2]) * y - x + u[:, 3]) + u[:, 4])


PAINTERS = {
    "grass": grass,
    "sand": sand,
    "snow": snow,
    "water": water,
    "bricks": bricks,
    "wood": wood,
    "night": night,
    "fabric": fabric,
}


def paint(names: list[str], cartoon: list[bool], size: int, rng: np.random.Generator) -> Tensor:
    """Paint one background per name; returns (B, 3, size, size) in [0, 1]."""
    u = torch.from_numpy(rng.random((len(names), 6, 1, 1))).float()
    tint = torch.from_numpy(rng.uniform(0.93, 1.07, (len(names), 3, 1, 1))).float()
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
    images = torch.empty(len(names), 3, size, size)
    for name, painter in PAINTERS.items():
        rows = [i for i, other in enumerate(names) if other == name]
        if not rows:
            continue
        tone = painter(x.expand(len(rows), -1, -1), y.expand(len(rows), -1, -1), u[rows]).clamp(0, 1)[:, None]
        flat = torch.tensor([cartoon[i] for i in rows]).view(-1, 1, 1, 1)
        steps = (tone * 3).floor().clamp(0, 2)
        smooth_steps = (steps + ((tone * 3 - steps - 0.5) * 6 + 0.5).clamp(0, 1)) / 3  # flat areas, soft edges
        tone = torch.where(flat, smooth_steps, tone)
        low, middle, high = (torch.tensor(colour).view(3, 1, 1) for colour in PALETTES[name])
        images[rows] = torch.where(
            tone < 0.5, low + (middle - low) * 2 * tone, middle + (high - middle) * (2 * tone - 1)
        )
    return (images * tint).clamp(0, 1)
