"""The fields of a concept file, each of which anyone may have written: their form, their length, their range."""

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.util.cli import UserError

HEADER = 2**20  # bytes of a concept file's header; that of a whole UNet's has a tenth
TENSORS, AXES = 10_000, 8
WORD, TEXT, TEXTS = 200, 2000, 10_000  # characters of a noun and of a prompt; prompts
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ATTENTIONS = ("foundation", "own")
HASH = r"[\w.:-]{1,128}"
FORMS = {  # field -> what it is made of; an architecture and a method become names of files and modules
    "architecture": (r"\w[\w .+-]{0,63}", "a name of letters, digits, blanks and . + - _, at most 64 long"),
    "method": (r"[a-z]\w{0,63}", "a name of letters, digits and _, at most 64 long"),
    "base_hash": (HASH, "a hash"),
    "covariance": (HASH, "a hash, or the word identity"),
}


def check_header(path: Path) -> None:
    """Raises ValueError for a safetensors file whose header is longer than any concept's, before it is read."""
    with open(path, "rb") as file:
        first = file.read(8)
    if len(first) == 8 and struct.unpack("<Q", first)[0] > HEADER:
        raise UserError(f"damaged, or no concept file: its header has more than {HEADER:,} bytes")


def check_words(superclass: str, templates: Iterable[str], noun: str = "") -> None:
    """What training and a concept file say in words; raises ValueError for none, control characters, or too many."""
    templates = tuple(templates)
    if not isinstance(superclass, str) or not superclass.strip():
        raise UserError("superclass: a concept needs a superclass word")
    if not templates:
        raise UserError("templates: a concept needs its training prompts")
    if len(templates) > TEXTS:
        raise UserError(f"templates: there are {len(templates):,} training prompts; at most {TEXTS:,} are taken")
    for name, value in {"superclass": superclass, "noun": noun}.items():
        text(name, value, WORD)
    for value in templates:
        text("templates", value)


def text(name: str, value: object, most: int = TEXT) -> None:
    """Raises ValueError for what is no printable text of at most so many characters."""
    if not isinstance(value, str):
        raise UserError(f"{name}: a text is wanted, not {shown(value)}")
    if len(value) > most:
        raise UserError(f"{name}: has {len(value):,} characters; at most {most:,} are taken")
    if odd := next((c for c in value if not c.isprintable()), ""):
        raise UserError(f"{name}: has the character {odd!a}, which cannot be printed: {shown(value)}")


def form(name: str, value: object) -> None:
    """Raises ValueError for a value that is not made as `FORMS` says."""
    pattern, words = FORMS[name]
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise UserError(f"{name}: {words} is wanted, not {shown(value)}")


def number(name: str, value: object, low: float = -1e9, high: float = 1e9) -> None:
    """Raises ValueError for what is no number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{name}: a number from {low:g} to {high:g} is wanted, not {shown(value)}")


def whole(name: str, value: object) -> None:
    """Raises ValueError for what is no whole number from 0 to 2**64 - 1."""
    if type(value) is not int or not 0 <= value < 2**64:
        raise UserError(f"{name}: a whole number from 0 to 2**64 - 1 is wanted, not {shown(value)}")


def check_options(options: object) -> None:
    """Raises ValueError for what is no mapping of a few names to plain values."""
    if not isinstance(options, Mapping) or len(options) > 100:
        raise UserError(f"options: a mapping of a few names to values is wanted, not {shown(options)}")
    for name, value in options.items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-z]\w{0,63}", name):
            raise UserError(f"options: {shown(name)} is no name")
        if isinstance(value, str):
            text(f"options.{name}", value)
        elif value is not None and not isinstance(value, bool):
            number(f"options.{name}", value, -(2.0**64), 2.0**64)


def check_parts(parts: object) -> None:
    """Raises ValueError for what is no mapping of a few components of a base model to hashes."""
    if not isinstance(parts, Mapping) or len(parts) > 10:
        raise UserError(f"base_parts: a mapping of components to hashes is wanted, not {shown(parts)}")
    for name, value in parts.items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-z]\w{0,63}", name):
            raise UserError(f"base_parts: {shown(name)} is no name")
        if not isinstance(value, str) or not re.fullmatch(HASH, value):
            raise UserError(f"base_parts.{name}: a hash is wanted, not {shown(value)}")


def check_tensors(tensors: object) -> None:
    """Raises ValueError for what is no mapping of names to finite floating-point tensors that hold something."""
    if not isinstance(tensors, Mapping) or not 0 < len(tensors) <= TENSORS:
        count = len(tensors) if isinstance(tensors, Mapping) else 0
        raise UserError(f"a concept needs 1 to {TENSORS:,} tensors; this one has {count or 'none'}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 300:
            raise UserError(f"the concept has a tensor of the name {shown(name)}, which no layer has")
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise UserError(f"the concept's tensor {name} holds {kind}, not floating-point numbers of 16 bits or more")
        if not tensor.numel() or tensor.ndim > AXES:
            raise UserError(f"the concept's tensor {name} has the shape {tuple(tensor.shape)[:AXES]}, which none has")


def as_whole(name: str, value: str) -> int:
    """The whole number that a text is; raises ValueError for another text."""
    if not re.fullmatch(r"[0-9]{1,20}", value):
        raise UserError(f"{name}: a whole number is wanted, not {shown(value)}")
    return int(value)


def as_number(name: str, value: str) -> float:
    """The finite number that a text is; raises ValueError for another text."""
    try:
        found = float(value[:100])
    except ValueError:
        found = math.nan
    if not math.isfinite(found) or len(value) > 100:
        raise UserError(f"{name}: a finite number is wanted, not {shown(value)}")
    return found


def as_truth(name: str, value: str) -> bool:
    """Whether a text says true; raises ValueError for one that says neither that nor false."""
    if value not in ("true", "false"):
        raise UserError(f"{name}: true or false is wanted, not {shown(value)}")
    return value == "true"


def as_parts(value: str) -> dict[str, str]:
    """The hashes of a JSON mapping of components; raises ValueError for anything else."""
    values = _json(value)
    check_parts(values)
    return values


def as_strings(name: str, value: str) -> list[str]:
    """The texts of a JSON list; raises ValueError for anything else."""
    values = _json(value)
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise UserError(f"{name}: expected a JSON list of strings, not {shown(value)}")
    return values


def as_options(value: str) -> dict[str, Any]:
    """The plain values of a JSON mapping; raises ValueError for anything else."""
    values = _json(value)
    if not isinstance(values, dict):
        raise UserError(f"options: expected a JSON mapping of plain values, not {shown(value)}")
    check_options(values)
    return values


def shown(value: object) -> str:
    """A value in a message: short, and on one line."""
    said = ascii(value[:80]) if isinstance(value, str) else type(value).__name__
    if isinstance(value, int | float):
        said = f"{value:.6g}" if abs(value) < 1e300 else "a number out of range"
    return said if len(said) <= 100 else f"{said[:97]}…"


def _json(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # ValueError: no JSON, or an integer of thousands of digits
        return None
