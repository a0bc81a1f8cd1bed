import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from infusion.concepts import fields
from infusion.concepts.concept import Concept

LAYER = "middle_block.1.transformer_blocks.0.attn2"


@pytest.fixture
def concept() -> Concept:
    return Concept({LAYER: torch.ones(8)}, "cat", ("a photo of a {}",), "sd15", date="2024-05-01")


@pytest.fixture
def file(concept: Concept, tmp_path: Path) -> Path:
    concept.save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def rewrite(path: Path, **metadata: str) -> None:
    with safe_open(path, "pt") as content:
        old = content.metadata()
    save_file(load_file(path), path, metadata=old | metadata)


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        Concept.load(path)
    said = str(error.value)
    assert said.startswith(f"{path}: ") and "\n" not in said and len(said) < len(str(path)) + 300
    return said


DEEP = "[" * 100_000 + "]" * 100_000
METADATA = [
    ("base_architecture", "../../../etc/passwd", "architecture: a name"),
    ("base_architecture", "/etc/passwd", "architecture: a name"),
    ("base_architecture", "..", "architecture: a name"),
    ("base_architecture", ".hidden", "architecture: a name"),
    ("base_architecture", "a\\b", "architecture: a name"),
    ("base_architecture", "a\0b", "architecture: a name"),
    ("base_architecture", "", "architecture: a name"),
    ("base_architecture", "x" * 100_000, "architecture: a name"),
    ("method", "../os", "method: a name"),
    ("method", "os.path", "method: a name"),
    ("method", "__init__", "method: a name"),
    ("base_sha256", "a/b", "base_hash: a hash"),
    ("base_sha256", "x" * 500, "base_hash: a hash"),
    ("covariance", "\x1b[2J", "covariance: a hash"),
    ("base_use_ema", "1", "base_use_ema: true or false is wanted"),
    ("base_parts", DEEP, "base_parts: a mapping of components to hashes"),
    ("base_parts", json.dumps({"../x": "ab"}), "base_parts: '../x' is no name"),
    ("base_parts", json.dumps({"vae": "a/b"}), "base_parts.vae: a hash"),
    ("attention", "other", "attention: 'other' is none of"),
    ("superclass", "cat\n", "superclass: has the character"),
    ("superclass", "\x1b]0;pwned\x07", "superclass: has the character"),
    ("superclass", "x" * 201, "superclass: has 201 characters"),
    ("modelspec.trigger_phrase", "\u202ecat", "noun: has the character"),
    ("modelspec.trigger_phrase", "x" * 201, "noun: has 201 characters"),
    ("templates", DEEP, "templates: expected a JSON list"),
    ("templates", "[" + "9" * 5000 + "]", "templates: expected a JSON list"),
    ("templates", json.dumps([["a {}"]]), "templates: expected a JSON list"),
    ("templates", json.dumps(["a {}"] * 10_001), "templates: there are 10,001 training prompts"),
    ("templates", json.dumps(["x" * 2001]), "templates: has 2,001 characters"),
    ("templates", json.dumps(["a {}\x00"]), "templates: has the character"),
    ("layers", DEEP, "layers: expected a JSON list"),
    ("layers", json.dumps([LAYER, "other"]), "not those of the tensors"),
    ("options", DEEP, "options: expected a JSON mapping"),
    ("options", "[]", "options: expected a JSON mapping"),
    ("options", '{"rank": [1]}', "options.rank: a number"),
    ("options", '{"rank": 1e999}', "options.rank: a number"),
    ("options", '{"rank": NaN}', "options.rank: a number"),
    ("options", '{"rank": ' + "9" * 4000 + "}", "options.rank: a number .*out of range"),
    ("options", '{"__class__": 1}', "options: '__class__' is no name"),
    ("options", json.dumps({"x": "y" * 3000}), "options.x: has 3,000 characters"),
    ("options", json.dumps({f"x{i}": i for i in range(101)}), "options: a mapping of a few"),
    ("steps", "9" * 5000, "steps: a whole number is wanted"),
    ("steps", "-1", "steps: a whole number is wanted"),
    ("steps", "1_000", "steps: a whole number is wanted"),
    ("steps", "٣", "steps: a whole number is wanted"),
    ("steps", "99999999999999999999", "steps: a whole number from 0"),
    ("seed", "1e3", "seed: a whole number is wanted"),
    ("learning_rate", "nan", "learning_rate: a finite number"),
    ("learning_rate", "inf", "learning_rate: a finite number"),
    ("learning_rate", "1" * 200, "learning_rate: a finite number"),
    ("learning_rate", "1e300", "learning_rate: a number from"),
    ("beta", "nan", "beta: a finite number"),
    ("beta", "-1e30", "beta: a number from"),
    ("tau", "inf", "tau: a finite number"),
    ("tau", "-1", "tau"),
    ("gate", "x" * 5000, "gate: 'xxx"),
    ("date", "x" * 3000, "date: has 3,000 characters"),
    ("date", "\x07", "date: has the character"),
    ("format", "x" * 5000, "no concept file"),
    ("format_version", "9" * 5000, "is no number"),
    ("format_version", "²", "is no number"),
    ("form", "x" * 5000, "its form is"),
]


@pytest.mark.parametrize(("key", "value", "message"), METADATA, ids=range(len(METADATA)))
def test_every_field_is_checked(file, key, value, message):
    rewrite(file, **{key: value})
    pytest.raises(ValueError, Concept.load, file).match(message)
    refused(file)


TENSORS = [
    ({LAYER: torch.zeros(0)}, "has the shape"),
    ({LAYER: torch.zeros(0, 2**40)}, "has the shape"),
    ({LAYER: torch.zeros([1] * 9)}, "has the shape"),
    ({LAYER: torch.zeros(8, dtype=torch.int64)}, "holds I64"),
    ({LAYER: torch.zeros(8, dtype=torch.bool)}, "holds BOOL"),
    ({LAYER: torch.zeros(8, dtype=torch.uint8)}, "holds torch.uint8"),
    ({LAYER: torch.zeros(8, dtype=torch.complex64)}, "holds C64"),
    ({LAYER: torch.zeros(8).to(torch.float8_e4m3fn)}, "holds F8_E4M3"),
    ({LAYER: torch.full((8,), 1e300, dtype=torch.float64)}, "is not finite"),
    ({LAYER: torch.tensor([1.0, float("-inf")])}, "is not finite"),
    ({"a\nb": torch.ones(1)}, "no layer has"),
    ({"x" * 301: torch.ones(1)}, "no layer has"),
    ({"": torch.ones(1)}, "no layer has"),
    ({f"x{i}": torch.ones(1) for i in range(fields.TENSORS + 1)}, "it has 10,001 tensors|has more than"),
]


@pytest.mark.parametrize(("tensors", "message"), TENSORS, ids=range(len(TENSORS)))
def test_tensors_that_no_concept_has(file, tensors, message):
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    file.write_bytes(save(tensors, metadata | {"layers": json.dumps(list(tensors))}))
    assert pytest.raises(ValueError, Concept.load, file).match(message)
    refused(file)


def test_a_header_longer_than_any_is_not_read(file):
    with file.open("wb") as content:
        content.write(struct.pack("<Q", 50_000_000) + b'{"__metadata__":{}')
        content.truncate(50_000_008)
    assert "its header has more than" in refused(file)


def test_what_a_concept_file_may_not_say_no_concept_can_be_made_of(concept):
    """So whatever is saved can be loaded."""
    for wrong in (
        *({"architecture": "../x"}, {"method": "a.b"}, {"superclass": "a\tb"}, {"templates": ("a\nb",)}),
        *({"options": {"x": [1]}}, {"steps": -1}, {"seed": 2**64}, {"learning_rate": float("nan")}, {"noun": "\0"}),
        *({"steps": True}, {"steps": 1.5}, {"base_hash": "a b"}, {"attention": ""}, {"options": {"A": 1}}),
    ):
        with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[-1]):
            replace(concept, **wrong)


def test_extremes_that_are_allowed_survive_the_file(concept, tmp_path):
    extreme = replace(
        concept,
        superclass="ñ" * 200,
        templates=("x" * 2000,),
        architecture="my model-2.1_x",
        options={"x": "", "rank": 2**63, "alpha": -1.5, "flag": True, "none": None},
        steps=2**64 - 1,
        seed=2**64 - 1,
    )
    for form in ("full", "half"):
        extreme.save(tmp_path / form, form)
        assert Concept.load(tmp_path / form).metadata() == extreme.metadata()
