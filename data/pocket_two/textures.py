"""Textures of the pocket world: a continuous family of two-colour patterns, some of which have a word.

A texture is a field in [0, 1] over the unit square of a sprite: 0 is the object's first colour, 1 its second. Kinds of
`WORDS` have a word in captions, and each its own angle, frequency, shift and balance, which vary about it: were they
free, a word would say nothing of what a noisy picture's pixels are, and a small model would not learn it. Sums of plane
waves ("waves") and overlays of two kinds have no word, so that a new texture lies between textures that are known.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WORDS = ("striped", "dotted", "checkered", "zigzag", "ringed", "halved", "gridded", "rayed", "banded", "faded")
UPRIGHT, ASLANT, LEVEL = 0.0, math.pi / 4, math.pi / 2
TURN, SHIFT = 0.35, 0.35  # a texture turns by so many radians either way, and shifts by up to so much of a period
RANGES = {  # kind -> its angle, and cycles in a sprite's side from, to
    "striped": (UPRIGHT, 3.0, 3.6),
    "dotted": (ASLANT, 3.0, 3.6),
    "checkered": (UPRIGHT, 1.9, 2.3),
    "zigzag": (LEVEL, 3.0, 3.4),
    "ringed": (UPRIGHT, 3.2, 3.8),
    "halved": (LEVEL, 1.0, 1.0),
    "gridded": (ASLANT, 2.6, 3.1),
    "rayed": (UPRIGHT, 4.0, 5.0),
    "banded": (LEVEL, 1.0, 1.0),
    "faded": (LEVEL, 1.0, 1.0),
}
WAVES = (1.8, 3.6)  # cycles of plane waves
SOFTNESS = 0.02  # half the width of an edge, in sprite sides: less than a pixel


@dataclass(frozen=True)
class Texture:
    """One field. `angle` in radians, `frequency` in cycles a side, `shift` in [0, 1)², `balance` in [-1, 1]."""

    kind: str
    angle: float
    frequency: float
    shift: tuple[float, float] = (0.0, 0.0)
    balance: float = 0.0
    waves: tuple[tuple[float, float, float], ...] = ()  # "waves" only: angle, frequency and phase of each further wave


def draw_texture(rng: np.random.Generator, kind: str, free: bool = False) -> Texture:
    """A random texture of one kind (of `WORDS`, or "waves"); a `free` one has any angle and shift."""
    if kind == "waves":
        waves = tuple(_wave(rng) for _ in range(rng.integers(2, 4)))
        angle, frequency, phase = waves[0]
        return Texture(kind, angle, frequency, (phase, 0.0), float(rng.uniform(-1, 1)), waves[1:])
    angle, low, high = RANGES[kind]
    turn, shift = (math.pi, 1.0) if free else (TURN, SHIFT)
    angle += float(rng.uniform(-turn, turn))
    frequency = float(rng.integers(int(low), int(high) + 1)) if kind == "rayed" else float(rng.uniform(low, high))
    shifts = (float(rng.uniform(0, shift)), float(rng.uniform(0, shift)))
    return Texture(kind, angle, frequency, shifts, float(rng.uniform(-1, 1)))


def _wave(rng: np.random.Generator) -> tuple[float, float, float]:
    return float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(*WAVES)), float(rng.random())


def fields(textures: Sequence[Texture], side: int) -> Tensor:
    """Fields (N, side, side) in [0, 1], float32, of N textures."""
    centres = (torch.arange(side) + 0.5) / side - 0.5  # (side,)
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    result = torch.empty(len(textures), side, side)
    for kind in {texture.kind for texture in textures}:
        rows = [i for i, texture in enumerate(textures) if texture.kind == kind]
        chosen = [textures[i] for i in rows]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values).view(-1, 1, 1)

        angle = column([t.angle for t in chosen])
        p = x * angle.cos() + y * angle.sin()  # (n, side, side): along the texture's angle
        q = y * angle.cos() - x * angle.sin()
        shift = column([t.shift[0] for t in chosen]), column([t.shift[1] for t in chosen])
        arguments = p, q, column([t.frequency for t in chosen]), *shift, column([t.balance for t in chosen])
        field = _waves(chosen, x, y) if kind == "waves" else KINDS[kind](*arguments)
        result[rows] = field
    return result


def overlay(first: Tensor, second: Tensor) -> Tensor:
    """Exclusive or of two fields: the second swaps the colours of the first."""
    return first + second - 2 * first * second


def _cut(distance: Tensor) -> Tensor:
    """Soft step: distance from an edge in sprite sides -> [0, 1]."""
    return (0.5 + 0.5 * distance / SOFTNESS).clamp(0, 1)


def _cosine(phase: Tensor) -> Tensor:
    return torch.cos(2 * torch.pi * phase)


def _striped(p: Tensor, q: Tensor, f: Tensor, u: Tensor, v: Tensor, balance: Tensor) -> Tensor:
    return _cut((_cosine(f * p + u) - 0.3 * balance) / (2 * torch.pi * f))


def _dotted(p: Tensor, q: Tensor, f: Tensor, u: Tensor, v: Tensor, balance: Tensor) -> Tensor:
    return _cut((_cosine(f * p + u) + _cosine(f * q + v) - 0.75 - 0.2 * balance) / (2 * torch.pi * f))


def _checkered(p: Tensor, q: Tensor, f: Tensor, u: Tensor, v: Tensor, balance: Tensor) -> Tensor:
    return _cut(_cosine(f * p + u) * _cosine(f * q + v) / (2 * torch.pi * f))


def _zigzag(p: Tensor, q: Tensor, f: Tensor, u: Tensor, v: Tensor, balance: Tensor) -> Tensor:
    teeth = 4 * (((0.75 * f) * q + v) % 1 - 0.5).abs() - 1  # [-1, 1]
    return _cut((_cosine(f * p + 0.42 * teeth + u) - 0.2 * balance) / (2 * torch.pi * f) / 1.4)


def _ringed(p: Tensor, q: Tensor, f: Tensor, u: Tensor, v: Tensor, balance: Tensor) -> Tensor:
    radius = ((p - 0.3 * (v - 0.5)) ** 2 + q**2).sqrt()
    return _cut((_cosine(f * radius + u) - 0.2 * balance) / (2 * torch.pi * f))


def _halved(p: Tensor, q: Tensor, f: Tensor, u: Tensor, v: Tensor, balance: Tensor) -> Tensor:
    return _cut(p + 0.08 * balance)


def _gridded(p: Tensor, q: Tensor, f: Tensor, u: Tensor, v: Tensor, balance: Tensor) -> Tensor:
    return _cut((torch.maximum(_cosine(f * p + u), _cosine(f * q + v)) - 0.72 - 0.08 * balance) / (2 * torch.pi * f))


def _rayed(p: Tensor, q: Tensor, f: Tensor, u: Tensor, v: Tensor, balance: Tensor) -> Tensor:
    radius, turn = (p**2 + q**2).sqrt(), torch.atan2(q, p) / (2 * torch.pi)
    return _cut((_cosine(f.round() * turn + u) - 0.2 * balance) * radius / f)


def _banded(p: Tensor, q: Tensor, f: Tensor, u: Tensor, v: Tensor, balance: Tensor) -> Tensor:
    return _cut(0.13 + 0.03 * balance - (p - 0.16 * (u - 0.5)).abs())


def _faded(p: Tensor, q: Tensor, f: Tensor, u: Tensor, v: Tensor, balance: Tensor) -> Tensor:
    return (0.5 + 1.5 * p + 0.1 * balance).clamp(0, 1)


def _waves(textures: list[Texture], x: Tensor, y: Tensor) -> Tensor:
    found = []
    for t in textures:
        waves = ((t.angle, t.frequency, t.shift[0]), *t.waves)
        total = sum(_cosine(f * (x * math.cos(angle) + y * math.sin(angle)) + phase) for angle, f, phase in waves)
        found.append(_cut((total - 0.4 * t.balance) / (2 * torch.pi * t.frequency)))
    return torch.stack(found)


KINDS: dict[str, Callable[..., Tensor]] = {
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
    "zigzag": _zigzag,
    "ringed": _ringed,
    "halved": _halved,
    "gridded": _gridded,
    "rayed": _rayed,
    "banded": _banded,
    "faded": _faded,
}
