"""A learned concept and its file: safetensors, one tensor per edited layer, everything else as metadata strings.

The file has three forms: "full" (float32), "half" (float16) and "compact" (`infusion.concepts.compact`);
docs/concept-file.md.
"""

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infusion.concepts import compact, fields
from infusion.concepts.forms import COMPACT, FORMS
from infusion.gate import IDENTITY, Gate
from infusion.tokens import Word
from ldm.util.cli import UserError
from ldm.util.files import write
from ldm.weights.checkpoint import write as write_tensors

FORMAT = "infusion-concept"
VERSION = 1  # of the forms full and half
NEWEST = compact.VERSION  # that can be read
STORED = ("F16", "BF16", "F32", "F64", "U8")  # U8: the streams of a compact file
MODELSPEC_ARCHITECTURES = {
    "sd15": "stable-diffusion-v1",
    "sd21": "stable-diffusion-v2-512",
    "sd21_768": "stable-diffusion-v2-768-v",
}


def now() -> str:
    """The time in UTC, ISO 8601; SOURCE_DATE_EPOCH, where it is set, takes the clock's place."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    return (datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)).isoformat(timespec="seconds")


@dataclass(frozen=True, eq=False)
class Concept:
    """What was learned, and what it was learned from.

    Attributes:
        tensors: name -> float32, what the method learned; of Infusion: layer name -> residual value embedding (C,).
        superclass: the noun of what the concept is one of.
        templates: the training prompts, with {} for the concept; they define the gate's target input.
        architecture: the base model's architecture, such as "sd15".
        base_hash: of the base model's weights (`StableDiffusion.hash`); None when they came from no file.
        base_use_ema: whether the base's UNet had its file's averaged weights.
        base_parts: component -> sha256 of the file of its own that it came from (`StableDiffusion.parts`).
        gate: as it was trained.
        covariance: fingerprint of the gate's inverse covariance (`infusion.gate.fingerprint`).
        method: name of the customisation method. attention: its attention, "foundation" or "own".
        options: arguments that the method was constructed with (`infusion.methods.base.Method.options`).
        noun: the words that stand for the concept in prompts; "" is the superclass.
        steps, learning_rate, seed: how it was trained. date: ISO 8601.

    Raises:
        ValueError: no tensors, a tensor that is empty, not floating or not finite, no superclass word, no templates, or
            a field that is not what it should be (`infusion.concepts.fields`).
    """

    tensors: dict[str, Tensor]
    superclass: str
    templates: tuple[str, ...]
    architecture: str
    base_hash: str | None = None
    gate: Gate = field(default_factory=Gate)
    covariance: str = IDENTITY
    method: str = "infusion"
    attention: str = "foundation"
    options: Mapping[str, Any] = field(default_factory=dict)
    noun: str = ""
    steps: int = 0
    learning_rate: float = 0.0
    seed: int = 0
    date: str = field(default_factory=now)
    base_use_ema: bool = False
    base_parts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fields.check_tensors(self.tensors)
        fields.check_words(self.superclass, self.templates, self.noun)
        for name in ("architecture", "method", "covariance", *(("base_hash",) if self.base_hash is not None else ())):
            fields.form(name, getattr(self, name))
        if self.attention not in fields.ATTENTIONS:
            raise UserError(f"attention: {fields.shown(self.attention)} is none of {', '.join(fields.ATTENTIONS)}")
        fields.check_options(self.options)
        fields.check_parts(self.base_parts)
        for name, value in {"beta": self.gate.beta, "tau": self.gate.tau, "learning_rate": self.learning_rate}.items():
            fields.number(name, value)
        fields.whole("steps", self.steps)
        fields.whole("seed", self.seed)
        fields.text("date", self.date)
        tensors = {name: tensor.detach().cpu().float().clone() for name, tensor in self.tensors.items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"the concept's tensor {name} is not finite (NaN or infinity): the training diverged")
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "templates", tuple(self.templates))
        object.__setattr__(self, "noun", self.noun.strip() or self.superclass)

    @property
    def word(self) -> Word:
        """The superclass word in its training prompts."""
        return Word(self.superclass, self.templates)

    @property
    def numbers(self) -> int:
        """How many numbers were learned."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def relative_error(self, reference: "Concept") -> float:
        """‖x - x_ref‖ / ‖x_ref‖ over the numbers of all layers; 0 where both are zero, infinite where only x_ref is.

        Raises:
            ValueError: the reference has other layers.
        """
        if self.tensors.keys() != reference.tensors.keys():
            raise UserError("the concepts have different layers")
        ours, theirs = (
            torch.cat([concept.tensors[name].double().flatten() for name in reference.tensors])
            for concept in (self, reference)
        )
        difference, norm = (ours - theirs).norm().item(), theirs.norm().item()
        return difference / norm if norm else (math.inf if difference else 0.0)

    def check_base(self, architecture: str, base_hash: str | None) -> None:
        """Warn when the base model is another one than the concept was trained on.

        Raises:
            ValueError: it is of another architecture.
        """
        if architecture != self.architecture:
            raise UserError(
                f"{self.superclass!r} was trained on {self.architecture!r}: it does not fit {architecture!r}"
            )
        if base_hash != self.base_hash:
            named = ["--use_ema"] * self.base_use_ema
            named += [f"--part {name}=FILE (sha256 {_short(part)})" for name, part in self.base_parts.items()]
            warnings.warn(
                f"the concept {self.superclass!r} was trained on another checkpoint of {architecture!r} "
                f"(sha256 {_short(self.base_hash)}, here {_short(base_hash)}): expect another likeness"
                + (f"; its own has {' and '.join(named)}" if named else ""),
                stacklevel=2,
            )

    def metadata(self) -> dict[str, str]:
        """What a file of the forms full and half says beside its tensors."""
        name = MODELSPEC_ARCHITECTURES.get(self.architecture, self.architecture)
        return {
            "format": FORMAT,
            "format_version": str(VERSION),
            "method": self.method,
            "attention": self.attention,
            **({"options": json.dumps(dict(self.options))} if self.options else {}),
            "superclass": self.superclass,
            "templates": json.dumps(self.templates),
            "gate": self.gate.kind,
            "beta": str(self.gate.beta),
            "tau": str(self.gate.tau),
            "covariance": self.covariance,
            "layers": json.dumps(list(self.tensors)),
            "base_architecture": self.architecture,
            "base_sha256": self.base_hash or "",
            **({"base_use_ema": "true"} if self.base_use_ema else {}),
            **({"base_parts": json.dumps(dict(sorted(self.base_parts.items())))} if self.base_parts else {}),
            "steps": str(self.steps),
            "learning_rate": str(self.learning_rate),
            "seed": str(self.seed),
            "date": self.date,
            "trained_words": json.dumps([self.noun]),
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{name}/{self.method}",
            "modelspec.implementation": "infusion",
            "modelspec.title": f"{self.superclass} ({self.method})",
            "modelspec.date": self.date,
            "modelspec.trigger_phrase": self.noun,
            "modelspec.usage_hint": "Write {} in the prompt where the concept goes, for example: a photo of a {}",
        }

    def save(self, path: str | Path, form: Literal["full", "half", "compact"] = "full") -> None:
        """Write the file in one go: it is there whole, or not at all. Makes the folder if need be.

        Raises:
            ValueError: an unknown form, numbers beyond float16's for "half", or too many of them, or too much metadata,
                for "compact".
        """
        path = Path(path)
        content = self._encoded(form) if form == COMPACT else self._rounded(form)
        if isinstance(content, bytes):
            write(path, content)
        else:
            write_tensors(path, content, self.metadata())

    def _encoded(self, form: str) -> bytes:
        metadata = self.metadata() | {"format_version": str(compact.VERSION), "form": form}
        del metadata["layers"]  # they are in the file's tensor `layers`
        return compact.encode(self.tensors, metadata)

    def _rounded(self, form: str) -> dict[str, Tensor]:
        if form not in FORMS:
            raise UserError(f"the form must be one of {', '.join(FORMS)}, not {form!r}")
        dtype = torch.float16 if form == "half" else torch.float32
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in self.tensors.items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{name} has numbers that float16 does not reach: choose the form full or compact")
        return tensors

    @classmethod
    def load(cls, path: str | Path) -> "Concept":
        """Read a concept file of any form.

        Raises:
            ValueError: the file is missing, damaged, no concept file, of a newer version, or has unusable contents;
                the message names the file.
        """
        tensors, metadata = contents(path)
        try:
            return cls._from_metadata(tensors, metadata)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def _from_metadata(cls, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> "Concept":
        try:
            layers = fields.as_strings("layers", metadata["layers"])
            if tensors and set(layers) != set(tensors):
                raise UserError("the layers that the metadata lists are not those of the tensors")
            return cls(
                tensors={name: tensors[name] for name in layers if name in tensors},
                superclass=metadata["superclass"],
                templates=tuple(fields.as_strings("templates", metadata["templates"])),
                architecture=metadata["base_architecture"],
                base_hash=metadata["base_sha256"] or None,
                base_use_ema=fields.as_truth("base_use_ema", metadata.get("base_use_ema", "false")),
                base_parts=fields.as_parts(metadata.get("base_parts", "{}")),
                gate=_gate(metadata),
                covariance=metadata["covariance"],
                method=metadata["method"],
                attention=metadata["attention"],
                options=fields.as_options(metadata.get("options", "{}")),
                noun=metadata.get("modelspec.trigger_phrase", ""),
                steps=fields.as_whole("steps", metadata["steps"]),
                learning_rate=fields.as_number("learning_rate", metadata["learning_rate"]),
                seed=fields.as_whole("seed", metadata["seed"]),
                date=metadata["date"],
            )
        except KeyError as error:
            raise UserError(f"the metadata lacks {error}") from error


def contents(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Layer name -> numbers as stored, and the metadata, of a concept file of any form.

    A compact file's are decoded: its numbers are float32, and its metadata list the layers.

    Raises:
        ValueError: the file is missing, damaged, no concept file, or of a newer version; the message names the file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such concept file")
    try:
        fields.check_header(Path(path))
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(metadata)
            form = metadata.get("form", "full")
            if form == COMPACT and Path(path).stat().st_size > compact.LIMIT:
                raise UserError(f"damaged: a compact file has at most {compact.LIMIT:,} bytes")
            names = list(file.keys())
            if len(names) > fields.TENSORS:
                raise UserError(f"no concept file: it has {len(names):,} tensors")
            for name in names:
                _check_stored(name, file.get_slice(name).get_dtype())
            tensors = {name: file.get_tensor(name) for name in names}
        if form == COMPACT:
            tensors = compact.decode(tensors, metadata)
            metadata = metadata | {"layers": json.dumps(list(tensors))}
        return tensors, metadata
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise UserError(f"{path}: damaged, or no safetensors file ({' '.join(str(error).split())[:200]})") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def describe(path: str | Path) -> dict[str, Any]:
    """What a concept file of any form says and holds, as values for JSON; see `contents`.

    Returns:
        `tensors`, `parameters`, `dtypes` and `metadata` as decoded, `form`, and for each of `layers` shape, dtype and
        Euclidean norm.
    """
    tensors, metadata = contents(path)
    layers = {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "norm": tensor.double().norm().item(),
        }
        for name, tensor in tensors.items()
    }
    dtypes = Counter(layer["dtype"] for layer in layers.values())
    return {
        "tensors": len(layers),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": dict(dtypes),
        "metadata": metadata,
        "form": metadata.get("form", "half" if set(dtypes) == {"float16"} else "full"),
        "layers": layers,
    }


def _check_stored(name: str, dtype: str) -> None:
    """Raises ValueError for a tensor that no form of a concept file has, before it is read."""
    if dtype not in STORED:
        raise UserError(f"the tensor {fields.shown(name)} holds {dtype}, not floating-point numbers of 16 bits or more")


def _check_format(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise UserError(f"no concept file: its format is {fields.shown(metadata.get('format'))}, not {FORMAT!r}")
    version = metadata.get("format_version", "")
    if not re.fullmatch(r"[0-9]{1,20}", version):
        raise UserError(f"the format version {fields.shown(version)} is no number")
    if int(version) > NEWEST:
        raise UserError(f"written by a newer version (format {version}; this code reads up to {NEWEST}): update")
    if metadata.get("form", "full") not in FORMS:
        raise UserError(f"its form is {fields.shown(metadata['form'])}, which is none of {', '.join(FORMS)}")


def _gate(metadata: Mapping[str, str]) -> Gate:
    kind = metadata["gate"]
    if kind not in ("sigmoid", "hard", "global"):
        raise UserError(f"gate: {fields.shown(kind)} is none of sigmoid, hard, global")
    return Gate(kind, *(fields.as_number(name, metadata[name]) for name in ("beta", "tau")))


def _short(base_hash: str | None) -> str:
    return base_hash[:12] if base_hash else "unknown"
