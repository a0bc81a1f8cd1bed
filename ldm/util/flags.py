"""Types of command-line flags that several commands have."""

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.util.defaults import PREFIXES
from ldm.util.errors import UserError, suggestion

if TYPE_CHECKING:
    import torch


MOST = 1_000_000  # of anything that is counted


def number(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"`{text}` is not a finite number")
    return value


def numbers(text: str) -> list[float]:
    """One or more finite numbers with commas between them."""
    try:
        return [number(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number, nor several with commas between them") from error


def words(text: str) -> list[str]:
    """One or more words, or groups of words, with commas between them."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"`{text}` is not a word, nor several with commas between them")
    return found


def components(text: str) -> dict[str, str]:
    """Component of a base model -> file that it comes from: one or more `unet=FILE` with commas between them."""
    found = {}
    for part in text.split(","):
        name, sign, file = part.strip().partition("=")
        if not sign or not file:
            raise argparse.ArgumentTypeError(f"`{part}` is not such as unet=FILE")
        if name not in PREFIXES:
            raise argparse.ArgumentTypeError(f"there is no component `{name}`{suggestion(name, list(PREFIXES))}")
        found[name] = file
    return found


class Together(argparse.Action):
    """A flag whose values are mappings; given several times, it holds all of them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: dict[str, str],
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (earlier if isinstance(earlier, dict) else {}) | values)


def add_base_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what weights a base model has: --ckpt, --part, --use_ema and --no-use_ema."""
    add = parser.add_argument
    add("--ckpt", metavar="FILE", help="weights of the base model; None: the backbone's usual file")
    add(
        "--part",
        metavar="P=FILE",
        type=components,
        action=Together,
        help="file of a component alone, such as vae=FILE (unet, vae, text; commas between several)",
    )
    add(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        help="take the averaged weights of the UNet in --ckpt; None: as the concepts were trained",
    )


def count(text: str, most: int = MOST) -> int:
    """A whole number above 0, and not absurd."""
    if not (text.isascii() and text.isdigit() and text.strip("0")):
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above 0")
    if len(text) > 20 or int(text) > most:
        raise argparse.ArgumentTypeError(f"`{text[:20]}` is more than {most:,}")
    return int(text)


def batch(text: str) -> int:
    """How many of something that takes much memory to work on at a time."""
    return count(text, 1000)


def processes(text: str) -> int:
    """How many processes of this machine are to work."""
    return count(text, max(8, os.cpu_count() or 1))


def writable(text: str) -> str:
    """A folder that files can be written to; it is made when they are."""
    path = Path(text).absolute()
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not os.path.isdir(there):
        raise argparse.ArgumentTypeError(f"{there}: is a file; name a folder to write to")
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise argparse.ArgumentTypeError(f"{there}: cannot be written to; name another folder")
    return text


def written(text: str) -> str:
    """A file in a folder that files can be written to."""
    writable(str(Path(text).parent))
    return text


def seed(text: str) -> int:
    """A whole number that `torch.Generator.manual_seed` takes, with room for those that follow it."""
    if not (text.isascii() and text.isdigit() and len(text) <= 20) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"`{text[:30]}` is not a whole number from 0 to 2**63 - 1")
    return int(text)


def find_device(name: str) -> "torch.device":
    """What `--device` names; "auto" is CUDA where there is some.

    Raises:
        UserError: the device cannot be used here.
    """
    import torch  # not above: commands answer --help and mistakes in flags without it

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: {name} cannot be used here: {str(error).splitlines()[0]}") from error
