"""The fields of a concept, which may come from anyone's file: `check_x` raises ValueError, `as_json` parses."""

import json
import re
from collections.abc import Iterable, Mapping
from reprlib import repr as shown  # a value in a message: short, and on one line
from typing import Any

import torch
from torch import Tensor

from ldm.util.cli import UserError

WORD, TEXT, TEXTS = 200, 2000, 10_000  # characters of a noun and of a prompt; prompts
TENSORS = 10_000
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAME = r"[a-z]\w{0,63}"  # of a method, which is the name of a module, and of its options
ARCHITECTURE = r"\w[\w .+-]{0,63}"  # which is the name of a config
HASH = r"[\w.:-]{1,128}"
FORMS = {"architecture": ARCHITECTURE, "method": NAME, "attention": "foundation|own", "covariance": HASH}
WANTED = {int: "a whole number", float: "a number", bool: "true or false", list: "a JSON list", dict: "a JSON mapping"}


def check_text(name: str, value: object, most: int = TEXT) -> None:
    """A printable text of at most so many characters."""
    if not isinstance(value, str):
        raise UserError(f"{name}: a text is wanted, not {shown(value)}")
    if len(value) > most:
        raise UserError(f"{name}: has {len(value):,} characters; at most {most:,} are taken")
    if odd := next((c for c in value if not c.isprintable()), ""):
        raise UserError(f"{name}: has the character {odd!a}, which cannot be printed: {shown(value)}")


def check_form(name: str, value: object, pattern: str) -> None:
    """A text that a regular expression fits."""
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise UserError(f"{name}: {shown(value)} is not of the form {pattern}")


def check_number(name: str, value: object, low: float = -1e9, high: float = 1e9, whole: bool = False) -> None:
    """A number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{name}: {kind} from {low:g} to {high:g} is wanted, not {shown(value)}")


def check_words(superclass: str, templates: Iterable[str], noun: str = "") -> None:
    """What training and a concept file say in words."""
    templates = tuple(templates)
    check_text("superclass", superclass, WORD)
    check_text("noun", noun, WORD)
    if not superclass.strip():
        raise UserError("superclass: a concept needs a superclass word")
    if not 0 < len(templates) <= TEXTS:
        raise UserError(f"templates: a concept needs its training prompts, 1 to {TEXTS:,}, not {len(templates):,}")
    for template in templates:
        check_text("templates", template)


def check_options(options: Mapping[str, Any]) -> None:
    """Up to 100 names, each with a text, number, truth value or None."""
    if len(options) > 100:
        raise UserError(f"options: a mapping of a few names to values is wanted, not of {len(options)}")
    for name, value in options.items():
        check_form("options", name, NAME)
        if isinstance(value, str):
            check_text(f"options.{name}", value)
        elif value is not None and not isinstance(value, bool):
            check_number(f"options.{name}", value, -(2.0**64), 2.0**64)


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Finite floating-point tensors that hold something, under printable names."""
    if not 0 < len(tensors) <= TENSORS:
        raise UserError(f"a concept needs 1 to {TENSORS:,} tensors; this one has {len(tensors) or 'none'}")
    for name, tensor in tensors.items():
        check_text("the name of a tensor", name, 300)
        if tensor.dtype not in DTYPES:
            raise UserError(f"the concept's tensor {name} holds {tensor.dtype}, not floating-point numbers")
        if not tensor.numel() or tensor.ndim > 8:
            raise UserError(f"the concept's tensor {name} has the shape {tuple(tensor.shape)[:8]}, which none has")
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"the concept's tensor {name} is not finite (NaN or infinity): the training diverged")


def as_json(name: str, text: str, kind: type) -> Any:
    """The value of that type (int, float, bool, list or dict) that a text is in JSON; ValueError for another."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # ValueError: no JSON, or an integer of thousands of digits
        value = None
    if type(value) is int and kind is float:
        value = float(value) if abs(value) < 1e300 else None
    if type(value) is not kind:
        raise UserError(f"{name}: {WANTED[kind]} is wanted, not {shown(text)}")
    return value
