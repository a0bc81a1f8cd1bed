"""How to sample: what a command lets one choose, and what is usual."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.diffusion.schedulers import SAMPLERS

if TYPE_CHECKING:
    from infusion.sampling.regions import Region

PRECISIONS, GATES = ("full", "autocast"), ("sigmoid", "hard", "global")
BETA, TAU = 0.7, 0.15  # the gate when sampling; training uses 0.75 and 0.1
PIXELS = 8192  # of a picture's side, at most
LONGEST = 10_000  # characters of a prompt; text encoders read 75 tokens of it


@dataclass(frozen=True)
class Settings:
    """How to sample; the names are those of the flags of `scripts/infusion_txt2img.py`.

    Attributes:
        steps: sampling steps. scale: classifier-free guidance, 1 is none.
        sampler: a key of `ldm.diffusion.schedulers.SAMPLERS`.
        ddim_eta: share of DDIM's noise, in [0, 1].
        negative_prompt: what to guide away from.
        H, W: pixels; None is the size of training.
        beta, tau, strength: one value, or one for each concept.
        gate: kind of gate, one or one for each concept; None is what each was trained with.
        replace_word: what stands in the prompts for each concept; None is what each was trained with.
        region: boxes that concepts keep to.
        precision: "full" is the model's own; "autocast" runs the UNet in half precision (`StableDiffusion.autocast`).

    Raises:
        ValueError: something out of range, whatever the model; the message names the flag.
    """

    steps: int = 50
    scale: float = 7.5
    sampler: str = "ddim"
    ddim_eta: float = 0.0
    negative_prompt: str = ""
    H: int | None = None
    W: int | None = None
    beta: float | Sequence[float] = BETA
    tau: float | Sequence[float] = TAU
    strength: float | Sequence[float] = 1.0
    gate: str | Sequence[str] | None = None
    replace_word: Sequence[str] | None = None
    region: "Sequence[Region]" = ()
    precision: str = "full"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps: must be at least 1, not {self.steps}")
        if not math.isfinite(self.scale):
            raise ValueError(f"--scale: must be a finite number, not {self.scale}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"--sampler: there is no {self.sampler!r}; there are {', '.join(SAMPLERS)}")
        if not 0 <= self.ddim_eta <= 1:
            raise ValueError(f"--ddim_eta: must be between 0 and 1, not {self.ddim_eta}")
        if self.ddim_eta and self.sampler != "ddim":
            raise ValueError(f"--ddim_eta: only the ddim sampler takes it, not {self.sampler}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"--precision: must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        for name, side in (("H", self.H), ("W", self.W)):
            if side is not None and not 1 <= side <= PIXELS:
                raise ValueError(f"--{name}: must be from 1 to {PIXELS} pixels, not {side}")
        for name in ("beta", "tau", "strength"):
            for value in each(getattr(self, name)):
                if not math.isfinite(value) or (name == "tau" and value <= 0):
                    limit = "above 0 and finite" if name == "tau" else "finite"
                    raise ValueError(f"--{name}: {name} must be {limit}, not {value}")
        for kind in each(self.gate or ()):
            if kind not in GATES:
                raise ValueError(f"--gate: the gate must be 'sigmoid', 'hard' or 'global', not {kind!r}")


def each(value: float | str | Sequence) -> Sequence:
    """One value as a sequence of one; a sequence as it is."""
    return (value,) if isinstance(value, float | int | str) else value
