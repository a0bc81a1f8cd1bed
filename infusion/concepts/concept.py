"""A learned concept: its tensors, and what they were learned from."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from infusion.concepts import fields, file
from infusion.concepts.runs import concept_files
from infusion.gate import IDENTITY, Gate
from infusion.tokens import Word
from ldm.util.cli import UserError, naming

MODELSPEC_ARCHITECTURES = {
    "sd15": "stable-diffusion-v1",
    "sd21": "stable-diffusion-v2-512",
    "sd21_768": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
}
TEXTS = ("method", "attention", "superclass", "covariance", "date")  # attributes that a file has as they are …
JSON = {"templates": list, "steps": int, "learning_rate": float, "seed": int}  # … and those that it has in JSON …
MORE = {"options": dict, "base_use_ema": bool, "base_parts": dict, "batch_size": int}  # … if there is something to say
REQUIRED = (*TEXTS, *JSON, "gate", "beta", "tau", "layers", "base_architecture", "base_sha256")  # of a file's metadata
TWINS = {"sd21", "sd21_768"}  # of the same tensors: files of other tools often do not say which one they are for


def now() -> str:
    """The time in UTC, ISO 8601; SOURCE_DATE_EPOCH, where it is set, takes the clock's place."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    return (datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)).isoformat(timespec="seconds")


@dataclass(frozen=True, eq=False)
class Concept:
    """What was learned, and what it was learned from. Whatever a `Concept` may be can be saved and loaded.

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
        batch_size: photos of an optimiser step, over accumulated batches and devices; 0: unknown.

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
    batch_size: int = 0

    def __post_init__(self) -> None:
        fields.check_tensors(self.tensors)
        fields.check_words(self.superclass, self.templates, self.noun)
        for name, pattern in fields.FORMS.items():
            fields.check_form(name, getattr(self, name), pattern)
        if self.base_hash is not None:
            fields.check_form("base_hash", self.base_hash, fields.HASH)
        for component, digest in self.base_parts.items():
            fields.check_form("base_parts", component, fields.NAME)
            fields.check_form(f"base_parts.{component}", digest, fields.HASH)
        fields.check_options(self.options)
        for name, value in (("beta", self.gate.beta), ("tau", self.gate.tau), ("learning_rate", self.learning_rate)):
            fields.check_number(name, value)
        for name in ("steps", "seed", "batch_size"):
            fields.check_number(name, getattr(self, name), 0, 2**64 - 1, whole=True)
        fields.check_text("date", self.date)
        tensors = {name: tensor.detach().cpu().float().clone() for name, tensor in self.tensors.items()}
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "templates", tuple(self.templates))
        object.__setattr__(self, "options", dict(self.options))
        object.__setattr__(self, "base_parts", dict(sorted(self.base_parts.items())))
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

    def check_architecture(self, architecture: str) -> None:
        """Raises ValueError for another architecture than that of the base model that the concept was trained on.

        Where tensors cannot tell the two apart, a concept whose file does not say its checkpoint fits both.
        """
        alike = self.base_hash is None and {architecture, self.architecture} == TWINS
        if architecture != self.architecture and not alike:
            raise UserError(
                f"{self.superclass!r} was trained on {self.architecture!r}: it does not fit {architecture!r}"
            )

    def check_base(self, architecture: str, base_hash: str | None) -> None:
        """Warn when the base model is another one than the concept was trained on.

        Raises:
            ValueError: it is of another architecture (`check_architecture`).
        """
        self.check_architecture(architecture)
        if base_hash != self.base_hash:
            named = ["--use_ema"] * self.base_use_ema
            named += [f"--part {name}=FILE (sha256 {_short(part)})" for name, part in self.base_parts.items()]
            trained = "may have been" if self.base_hash is None else "was"
            warnings.warn(
                f"the concept {self.superclass!r} {trained} trained on another checkpoint of {architecture!r} "
                f"(sha256 {_short(self.base_hash)}, here {_short(base_hash)}): expect another likeness"
                + (f"; its own has {' and '.join(named)}" if named else ""),
                stacklevel=2,
            )

    def metadata(self) -> dict[str, str]:
        """What a file says beside its tensors, in any form (docs/concept-file.md)."""
        name = MODELSPEC_ARCHITECTURES.get(self.architecture, self.architecture)
        said = [key for key in (*JSON, *MORE) if key in JSON or getattr(self, key)]
        return {
            **{key: getattr(self, key) for key in TEXTS},
            **{key: json.dumps(getattr(self, key)) for key in said},
            "gate": self.gate.kind,
            "beta": str(self.gate.beta),
            "tau": str(self.gate.tau),
            "base_architecture": self.architecture,
            "base_sha256": self.base_hash or "",
            "trained_words": json.dumps([self.noun]),
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": f"{name}/{self.method}",
            "modelspec.implementation": "infusion",
            "modelspec.title": f"{self.superclass} ({self.method})",
            "modelspec.date": self.date,
            "modelspec.trigger_phrase": self.noun,
            "modelspec.usage_hint": "Write {} in the prompt where the concept goes, for example: a photo of a {}",
        }

    def save(
        self,
        path: str | Path,
        form: Literal["full", "half", "compact"] = "full",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write a concept file, with `metadata` or with no more than its own; raises ValueError as `file.write`."""
        file.write(Path(path), self.tensors, self.metadata() if metadata is None else metadata, form)

    @classmethod
    def load(cls, path: str | Path, **said: Any) -> Self:
        """Read a concept file of any form, or a file of another tool (docs/files.md).

        Args:
            path: a file; or a run folder, whose last file is read; or a diffusers folder, or one of an adapter.
            said: what another tool's file does not say or says otherwise: superclass, noun, templates, architecture.

        Raises:
            ValueError: the file is missing, damaged, nothing that is read as a concept, of a newer version, or has
                unusable contents; the message names the file.
        """
        path = concept_files(path)[-1]
        if not path.is_dir():
            with file.opened(path) as content, naming(str(path)):
                if file.is_concept(content):
                    tensors, metadata = file.contents(content)
                    if said:
                        raise UserError(f"a concept file, which says itself what its {next(iter(said))} is")
                    return cls._from_metadata(tensors, metadata)
        try:  # it knows all models, which a machine that only reads concepts need not have
            from infusion.concepts import others
        except ModuleNotFoundError as error:
            raise UserError(f"{path}: no concept file; {file.UNKNOWN}") from error
        return others.load(path, said)

    @classmethod
    def _from_metadata(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Self:
        if lacking := [name for name in REQUIRED if name not in metadata]:
            raise UserError(f"the metadata lacks {lacking[0]!r}")
        kinds = JSON | MORE | {"beta": float, "tau": float, "layers": list}
        parsed = {key: fields.as_json(key, metadata[key], kind) for key, kind in kinds.items() if key in metadata}
        layers, gate = parsed.pop("layers"), Gate(metadata["gate"], parsed.pop("beta"), parsed.pop("tau"))
        if not all(isinstance(name, str) for name in layers) or set(layers) != set(tensors):
            raise UserError("the layers that the metadata lists are not those of the tensors")
        return cls(
            tensors={name: tensors[name] for name in layers},
            architecture=metadata["base_architecture"],
            base_hash=metadata["base_sha256"] or None,
            gate=gate,
            noun=metadata.get("modelspec.trigger_phrase", ""),
            **{key: metadata[key] for key in TEXTS},
            **parsed,
        )


def _short(base_hash: str | None) -> str:
    return base_hash[:12] if base_hash else "unknown"
