import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from infusion.concepts.concept import Concept

LAYER = "middle_block.1.transformer_blocks.0.attn2"


@pytest.fixture
def concept() -> Concept:
    return Concept({LAYER: torch.ones(8)}, "cat", ("a photo of a {}",), "sd15", date="2024-05-01")


@pytest.fixture
def file(concept: Concept, tmp_path: Path) -> Path:
    concept.save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


def rewrite(path: Path, **metadata: str | None) -> None:
    """The file with some metadata changed; None: left out."""
    with safe_open(path, "pt") as content:
        said = content.metadata() | metadata
    save_file(load_file(path), path, metadata={key: value for key, value in said.items() if value is not None})


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        Concept.load(path)
    said = str(error.value)
    assert said.startswith(f"{path}: ") and "\n" not in said and len(said) < len(str(path)) + 300
    return said.removeprefix(f"{path}: ")


DEEP = "[" * 100_000 + "]" * 100_000
METADATA = [
    *(
        ("base_architecture", name, "architecture: ")
        for name in ("../../../etc/passwd", "..", "a\0b", "", "x" * 100_000)
    ),
    *(("method", name, "method: ") for name in ("../os", "os.path", "__init__")),
    ("base_sha256", "a/b", "base_hash: "),
    ("covariance", "\x1b[2J", "covariance: "),
    ("base_use_ema", "1", "base_use_ema: true or false"),
    ("base_parts", DEEP, "base_parts: a JSON mapping"),
    ("base_parts", json.dumps({"../x": "ab"}), "base_parts: '../x'"),
    ("base_parts", json.dumps({"vae": "a/b"}), "base_parts.vae: "),
    ("attention", "other", "attention: 'other'"),
    ("superclass", "\x1b]0;pwned\x07", "superclass: has the character"),
    ("superclass", " ", "superclass: a concept needs"),
    ("superclass", None, "the metadata lacks 'superclass'"),
    ("superclass", "x" * 201, "superclass: has 201 characters"),
    ("modelspec.trigger_phrase", "\u202ecat", "noun: has the character"),
    ("templates", DEEP, "templates: a JSON list"),
    ("templates", "[" + "9" * 5000 + "]", "templates: a JSON list"),
    *(("templates", text, "templates: a JSON list") for text in ("a photo", '{"a": 1}')),
    ("templates", json.dumps([["a {}"]]), "templates: a text"),
    ("templates", "[]", "training prompts"),
    ("templates", json.dumps(["a {}"] * 10_001), "templates: .* not 10,001"),
    ("templates", json.dumps(["x" * 2001]), "templates: has 2,001 characters"),
    ("layers", DEEP, "layers: a JSON list"),
    *(("layers", json.dumps(names), "not those of the tensors") for names in ([LAYER, "other"], [])),
    ("options", "[]", "options: a JSON mapping"),
    ("options", '{"rank": [1]}', "options.rank: a number"),
    ("options", '{"rank": NaN}', "options.rank: a number"),
    ("options", '{"rank": ' + "9" * 4000 + "}", "options.rank: a number .*999"),
    ("options", '{"__class__": 1}', "options: '__class__'"),
    ("options", json.dumps({f"x{i}": i for i in range(101)}), "options: a mapping of a few"),
    ("batch_size", "-4", "batch_size: a whole number"),
    *(("steps", text, "steps: a whole number") for text in ("9" * 5000, "-1", "1_000", "٣", "9" * 20, "1e3", "true")),
    *(("learning_rate", text, "learning_rate: a number") for text in ("nan", "inf", "NaN", "1" * 400, "1e300", "x")),
    *(("beta", text, "beta") for text in ("NaN", "-1e30")),
    *(("tau", text, "tau") for text in ("Infinity", "-1", "0")),
    ("gate", "soft", "gate"),
    ("date", "\x07", "date: has the character"),
    *(("format", text, "no concept file") for text in ("x" * 5000, "pt", None)),
    ("format_version", "4", "newer version"),
    *(("format_version", text, "is no number") for text in ("9" * 5000, "²")),
    ("form", "x" * 5000, "its form is"),
    ("form", "compact", "two tensors"),
]


@pytest.mark.parametrize(("key", "value", "message"), METADATA, ids=range(len(METADATA)))
def test_every_field_is_checked(file, key, value, message):
    rewrite(file, **{key: value})
    assert re.search(message, refused(file))


TENSORS = [
    ({LAYER: torch.zeros(0)}, "has the shape"),
    ({LAYER: torch.zeros([1] * 9)}, "has the shape"),
    *(({LAYER: torch.zeros(8).to(kind)}, "holds torch") for kind in (torch.int64, torch.complex64, torch.float8_e5m2)),
    ({LAYER: torch.full((8,), 1e300, dtype=torch.float64)}, "is not finite"),
    ({LAYER: torch.tensor([1.0, float("-inf")])}, "is not finite"),
    ({"a\nb": torch.ones(1)}, "cannot be printed"),
    ({"x" * 301: torch.ones(1)}, "has 301 characters"),
]


@pytest.mark.parametrize(("tensors", "message"), TENSORS, ids=range(len(TENSORS)))
def test_tensors_that_no_concept_has(file, tensors, message):
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    file.write_bytes(save(tensors, metadata | {"layers": json.dumps(list(tensors))}))
    assert re.search(message, refused(file))


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
