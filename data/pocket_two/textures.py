"""Textures of the pocket world: a continuous family of two-colour patterns, some of which have a word.

A texture is a field in [0, 1] over the unit square of a sprite: 0 is the object's first colour, 1 its second. Every
kind has a free angle, frequency, phase and balance; kinds of `WORDS` have a word in captions. Sums of plane waves
("waves") and overlays of two kinds have none, so that a new texture lies between textures that are known.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WORDS = ("striped", "dotted", "checkered", "zigzag", "ringed", "halved", "gridded", "rayed", "banded", "faded")
FREQUENCIES = {
    "striped": (3.0, 4.6),
    "dotted": (3.0, 4.2),
    "checkered": (1.9, 2.8),
    "zigzag": (3.0, 4.0),
    "ringed": (3.2, 4.6),
    "halved": (1.0, 1.0),
    "gridded": (2.6, 3.6),
    "rayed": (4.0, 6.0),
    "banded": (1.0, 1.0),
    "faded": (1.0, 1.0),
    "waves": (1.8, 3.6),
}  # fmt: skip  cycles in a sprite's side
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


def draw_texture(rng: np.random.Generator, kind: str) -> Texture:
    """A random texture of one kind (of `WORDS`, or "waves")."""
    low, high = FREQUENCIES[kind]
    frequency = float(rng.integers(int(low), int(high) + 1)) if kind == "rayed" else float(rng.uniform(low, high))
    waves = ()
    if kind == "waves":
        waves = tuple(
            (float(rng.uniform(0, math.pi)), float(rng.uniform(low, high)), float(rng.random()))
            for _ in range(rng.integers(1, 3))
        )
    shift = (float(rng.random()), float(rng.random()))
    return Texture(kind, float(rng.uniform(0, 2 * math.pi)), frequency, shift, float(rng.uniform(-1, 1)), waves)


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
