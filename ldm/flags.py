"""Types of command-line flags that several commands have."""

import argparse
import math
from typing import TYPE_CHECKING

from ldm.errors import UserError

if TYPE_CHECKING:
    import torch


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


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number above 0")
    return int(text)


def seed(text: str) -> int:
    """A whole number that `torch.Generator.manual_seed` takes."""
    if not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"`{text}` is not a whole number from 0 to 2**63 - 1")
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
