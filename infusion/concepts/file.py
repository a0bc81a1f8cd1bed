"""Concept files on disk: safetensors in three forms, with everything that is no tensor as metadata strings.

"full" is float32, "half" float16, "compact" at most 11,264 bytes on SD (`infusion.concepts.compact`);
docs/concept-file.md.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from infusion.concepts import FORMS, compact
from infusion.concepts.fields import shown
from ldm.util import files
from ldm.util.cli import UserError, naming
from ldm.weights.files import CONCEPT, TensorFile, serialise

UNKNOWN = "scripts/inspect_file.py says what it is"
VERSION = 1  # of the forms full and half
COMPACT, NEWEST = 2, 3  # of the form compact: up to SD 1.5's size; above, and the newest that can be read


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], form: str) -> None:
    """Write a concept file in one go: it is there whole, or not at all. Makes the folder if need be.

    Args:
        tensors: layer name -> float32.
        metadata: all that the file says beside them, but format, version, form and the layers' names.
        form: one of `FORMS`.

    Raises:
        ValueError: an unknown form, numbers beyond float16's for "half", or too many of them, or too much metadata,
            for "compact".
    """
    if form not in FORMS:
        raise UserError(f"the form must be one of {', '.join(FORMS)}, not {form!r}")
    said = {"format": CONCEPT, "format_version": str(VERSION)} | dict(metadata)
    if form == "compact":
        large = sum(tensor.numel() for tensor in tensors.values()) > compact.PER
        version = NEWEST if large else COMPACT
        content = compact.encode(tensors, said | {"format_version": str(version), "form": form})
    else:
        rounded = {name: tensor.half() if form == "half" else tensor for name, tensor in tensors.items()}
        if beyond := [name for name, tensor in rounded.items() if not tensor.isfinite().all()]:
            raise UserError(f"{beyond[0]} has numbers that float16 does not reach: choose the form full or compact")
        content = serialise(rounded, said | {"layers": json.dumps(list(tensors))})
    files.write(path, content)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layer name -> numbers as stored, and the metadata, of a concept file of any form.

    A compact file's are decoded: its numbers are float32, and its metadata list the layers.

    Raises:
        ValueError: the file is missing, damaged, no concept file, or of a newer version; the message names the file.
    """
    with opened(path) as file, naming(str(path)):
        return contents(file)


def opened(path: str | Path) -> TensorFile:
    """A file that may be a concept's; raises ValueError where it is missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such concept file")
    return TensorFile(path)


def is_concept(file: TensorFile) -> bool:
    """Whether a file is one of this project's own."""
    return file.metadata.get("format") == CONCEPT


def contents(file: TensorFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `read` gives, of an open file; the message of an error does not name the file."""
    if not is_concept(file):
        raise UserError(f"no concept file; {UNKNOWN}")
    _check_version(file.metadata)
    tensors = {name: file.read(name) for name in file.shapes}
    if file.metadata.get("form") != "compact":
        return tensors, file.metadata
    _check_size(file.path, compact.NUMBERS)  # before anything is decoded
    tensors = compact.decode(tensors, file.metadata)
    _check_size(file.path, sum(tensor.numel() for tensor in tensors.values()))
    return tensors, file.metadata | {"layers": json.dumps(list(tensors))}


def describe(path: str | Path) -> dict[str, Any]:
    """What a concept file of any form says and holds, as values for JSON; raises ValueError as `read`.

    Returns:
        `tensors`, `parameters`, `dtypes` and `metadata` as decoded, `form`, and for each of `layers` shape, dtype and
        Euclidean norm.
    """
    tensors, metadata = read(path)
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    layers = {
        name: {"shape": list(tensor.shape), "dtype": dtypes[name], "norm": tensor.double().norm().item()}
        for name, tensor in tensors.items()
    }
    return {
        "tensors": len(layers),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": dict(Counter(dtypes.values())),
        "metadata": metadata,
        "form": metadata.get("form", "half" if set(dtypes.values()) == {"float16"} else "full"),
        "layers": layers,
    }


def _check_size(path: Path, numbers: int) -> None:
    if path.stat().st_size > (most := compact.limit(numbers)):
        raise UserError(f"damaged: a compact file of {numbers:,} numbers has at most {most:,} bytes")


def _check_version(metadata: Mapping[str, str]) -> None:
    version = metadata.get("format_version", "")
    if not re.fullmatch("[0-9]{1,9}", version):
        raise UserError(f"the format version {shown(version)} is no number")
    if int(version) > NEWEST:
        raise UserError(f"written by a newer version (format {version}; this code reads up to {NEWEST}): update")
    if metadata.get("form", "full") not in FORMS:
        raise UserError(f"its form is {shown(metadata['form'])}, which is none of {', '.join(FORMS)}")
