"""Everything that can be said of a file without loading it: what `scripts/inspect_file.py` prints."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch

from ldm.util.config import backbones, instantiate
from ldm.weights.checkpoint import sha256
from ldm.weights.diffusers_layout import PARTS, Folder, open_checkpoint
from ldm.weights.files import TensorFile
from ldm.weights.names import EMA, PREFIXES, match
from ldm.weights.recognise import Kind, config_name, prediction_type, recognise


def inspect_file(path: str | Path) -> dict[str, Any]:
    """What a checkpoint, a concept file or a diffusers folder holds, as values for JSON. No model gets values.

    Returns:
        For every file: `file`, `format`, `bytes`, `sha256`, `kind`, `says`, `tensors`, `parameters`, `dtypes`,
        `metadata`. For a base checkpoint also `architecture` (the first of those in `configs`, which its tensors all
        fit), `prediction_type` and where that is known from, `has_ema`, `components`, and against the architecture
        `missing`, `wrong_shapes` and `unexpected`. For a concept file also `form` and `layers`: shape, dtype and
        Euclidean norm; tensors, dtypes and metadata are those that a compact one decodes to.

    Raises:
        ValueError: nothing is there, or it cannot be read safely; a concept file is damaged, or of a newer version.
    """
    with open_checkpoint(path) as file:
        kind = recognise(file)
        counts = {name: prod(shape) for name, shape in file.shapes.items()}
        paths = [part.path for part in file.files.values()] if isinstance(file, Folder) else [file.path]
        facts: dict[str, Any] = {
            "file": str(path),
            "format": file.format,
            "bytes": sum(path.stat().st_size for path in paths),
            "sha256": sha256(path),
            "kind": kind.name,
            "says": kind.says,
            "tensors": len(counts),
            "parameters": sum(counts.values()),
            "dtypes": dict(Counter(map(_short, file.dtypes.values()))),
            "metadata": file.metadata,
        }
        if kind.name == "base checkpoint":
            facts |= _base(file, kind, counts)
        if kind.name == "concept":
            facts |= _concept(file.path)
    return facts


def _base(file: TensorFile | Folder, kind: Kind, counts: dict[str, int]) -> dict[str, Any]:
    known, source = _prediction(file, kind)
    starts = {name: f"{PARTS[name]}/" if isinstance(file, Folder) else prefix for name, prefix in PREFIXES.items()}
    facts: dict[str, Any] = {
        "architecture": kind.architectures[0] if kind.architectures else None,
        "configs": [config_name(name) for name in kind.architectures],
        "prediction_type": known or "unknown",
        "prediction_type_from": source,
        "has_ema": any(name.startswith(EMA) for name in counts),
        "components": {
            component: sum(count for name, count in counts.items() if name.startswith(start))
            for component, start in starts.items()
        },
    }
    if kind.architectures:
        with torch.device("meta"):
            sd = instantiate(backbones()[kind.architectures[0]], "sd")
        found = match(file, {prefix: getattr(sd, component) for component, prefix in PREFIXES.items()})
        facts |= {"missing": found.missing, "wrong_shapes": found.wrong, "unexpected": found.unexpected}
    return facts


def _prediction(file: TensorFile | Folder, kind: Kind) -> tuple[str | None, str | None]:
    """What the UNet predicts, and what says so; None where nothing does: tensors are the same for both."""
    if isinstance(file, Folder) and file.prediction_type:
        return file.prediction_type, "scheduler/scheduler_config.json"
    for key in ("modelspec.prediction_type", "modelspec.architecture"):
        value = file.metadata.get(key, "")
        if value in ("epsilon", "v") or value.endswith("-768-v"):
            return "epsilon" if value == "epsilon" else "v_prediction", f"metadata {key}"
        if value in kind.architectures:
            return prediction_type(value), f"metadata {key}"
    types = {prediction_type(name) for name in kind.architectures}
    return (types.pop(), config_name(kind.architectures[0])) if len(types) == 1 else (None, None)


def _concept(path: Path) -> dict[str, Any]:
    from infusion.concepts.concept import contents  # the method builds on this package, not the other way round

    tensors, metadata = contents(path)
    layers = {
        name: {"shape": list(tensor.shape), "dtype": _short(tensor.dtype), "norm": tensor.double().norm().item()}
        for name, tensor in tensors.items()
    }
    dtypes = Counter(layer["dtype"] for layer in layers.values())
    stored = "half" if set(dtypes) == {"float16"} else "full"
    return {
        "tensors": len(layers),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": dict(dtypes),
        "metadata": metadata,
        "form": metadata.get("form", stored),
        "layers": layers,
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
