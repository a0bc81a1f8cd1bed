"""How to draw: every choice is declared here once, for Python, flags, prompt files and the text of PNGs."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ldm.diffusion.schedulers import SAMPLERS
from ldm.util.cli import UserError, check_range, count, number, numbers, words

if TYPE_CHECKING:
    from infusion.sampling.regions import Region

PRECISIONS, GATES = ("full", "autocast"), ("sigmoid", "hard", "global")
BETA, TAU = 0.7, 0.15  # the gate when sampling; training uses 0.75 and 0.1
PIXELS = 8192  # of a picture's side, at most
LONGEST = 10_000  # characters of a prompt; `ldm.models.tokenizer.WINDOWS` limits its tokens


def setting(default: object, convert: Callable[[str], object], text: str, also: str = "", **flag: object) -> Any:
    """A field of `Settings`: its default, how a flag's value is read, its help, and a flag's other name."""
    return field(default=default, metadata={"type": convert, "help": text, "also": also, **flag})


@dataclass(frozen=True)
class Settings:
    """How to draw. Height and width None are the size of training; gate and noun None are as a concept was trained.

    Of beta, tau, strength, gate and noun there is one value, or one for each concept. With the precision "autocast" the
    UNet runs in half precision (`StableDiffusion.autocast`); "full" is the model's own.

    Raises:
        ValueError: something out of range for any model; the message begins with the field's name.
    """

    steps: int = setting(50, count, "sampling steps", "ddim_steps")
    scale: float = setting(7.5, number, "classifier-free guidance; 1 is none")
    sampler: str = setting("ddim", str, "the sampler", choices=tuple(SAMPLERS))
    eta: float = setting(0.0, number, "share of DDIM's noise; 0 is deterministic", "ddim_eta")
    negative_prompt: str = setting("", str, "what to guide away from")
    height: int | None = setting(None, count, "None: the size of the base model's training", "H", metavar="PIXELS")
    width: int | None = setting(None, count, "None: likewise", "W", metavar="PIXELS")
    beta: float | Sequence[float] = setting(BETA, numbers, "similarity at which the gate is half open", metavar="B[,B]")
    tau: float | Sequence[float] = setting(TAU, numbers, "temperature of the gate, above 0", metavar="T[,T]")
    strength: float | Sequence[float] = setting(1.0, numbers, "factor on what was learned", metavar="S[,S]")
    gate: str | Sequence[str] | None = setting(
        None, words, "sigmoid, hard or global; None: as the concept was trained", metavar="G[,G]"
    )
    noun: str | Sequence[str] | None = setting(
        None, words, "what {} reads as; None: as the concept was trained", "replace_word", metavar="W[,W]"
    )
    region: "Sequence[Region]" = setting(
        (), str, "keep concept K to a box, in shares of the image", nargs="+", metavar="K:x0,y0,x1,y1"
    )
    precision: str = setting("full", str, "of the UNet", choices=PRECISIONS)

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1)
        check_range("scale", self.scale)
        check_range("eta", self.eta, 0, 1)
        if self.eta and self.sampler != "ddim":
            raise UserError(f"eta: only the ddim sampler takes it, not {self.sampler}")
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None:
                check_range(name, side, 1, PIXELS)
        for name, low in (("beta", -math.inf), ("tau", 0), ("strength", -math.inf)):
            for value in each(getattr(self, name)):
                check_range(name, value, low, inside=True)
        named = (("sampler", [self.sampler], SAMPLERS), ("precision", [self.precision], PRECISIONS))
        for name, values, known in (*named, ("gate", each(self.gate or ()), GATES)):
            for value in values:
                if value not in known:
                    raise UserError(f"{name}: must be one of {', '.join(known)}, not {value!r}")


FORMER = {own.metadata["also"]: own.name for own in fields(Settings) if own.metadata["also"]}  # older name -> name


def add_settings_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting, by its name and its older one."""
    for own in fields(Settings):
        flag = dict(own.metadata)
        names = [f"--{name}" for name in (own.name, flag.pop("also")) if name]
        parser.add_argument(*names, default=None if own.default == () else own.default, **flag)


def each(value: float | str | Sequence) -> Sequence:
    """One value as a sequence of one; a sequence as it is."""
    return (value,) if isinstance(value, float | int | str) else value


def for_each(value: Any, concepts: int, name: str) -> list:
    """The values of K concepts, of which one or K are given; raises ValueError for another number of them."""
    values = list(each(value))
    if len(values) == 1:
        values = values * concepts
    if len(values) != concepts:
        raise UserError(f"give one {name} for all concepts or one for each of {concepts}, not {len(values)}")
    return values
