"""Files as commit b0d21b8 wrote them: every form and method of that time, small random numbers on the pocket model."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from infusion.concepts import FORMS
from infusion.concepts.concept import Concept
from infusion.methods import method_of

FILES = Path(__file__).parent / "files"
NAMES = sorted(path.name.removesuffix("-full.safetensors") for path in FILES.glob("*-full.safetensors"))
COUNTS = {"custom_diffusion": 256, "dreambooth": 1476, "infusion": 1152, "infusion_keys": 2304, "lora": 1024,
          "perfusion": 1408, "textual_inversion": 128}  # fmt: skip


def load(name: str, form: str) -> Concept:
    return Concept.load(FILES / f"{name}-{form}.safetensors")


def test_there_is_one_of_every_method():
    assert set(NAMES) == set(COUNTS)


@pytest.mark.parametrize("name", NAMES)
def test_what_it_says(name):
    concept = load(name, "full")
    assert concept.method == name.removesuffix("_keys") and concept.numbers == COUNTS[name]
    assert (concept.superclass, concept.architecture, concept.steps, concept.seed) == ("dog", "pocket", 7, 3)
    assert concept.templates == ("a photo of a {}", "an image of the {}") and concept.learning_rate == 0.01
    assert concept.date == "2024-05-01T12:00:00+00:00" and len(concept.base_hash) == 64
    assert concept.gate.kind == ("hard" if name == "infusion_keys" else "sigmoid")
    method = method_of(concept)
    assert method.noun("dog") == concept.noun and dict(method.options) == dict(concept.options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("form", "error"), [("half", 1e-3), ("compact", 0.01)])
def test_the_forms_hold_the_same(name, form, error):
    full, other = load(name, "full"), load(name, form)
    assert 0 < other.relative_error(full) < error
    assert other.metadata() == full.metadata()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_now_says_and_holds_the_same(name, form, tmp_path):
    old, new = FILES / f"{name}-{form}.safetensors", tmp_path / "new.safetensors"
    Concept.load(old).save(new, form)
    assert new.stat().st_size == old.stat().st_size
    with safe_open(old, "pt") as before, safe_open(new, "pt") as after:
        assert after.metadata() == before.metadata() and after.keys() == before.keys()
        assert all(torch.equal(after.get_tensor(key), before.get_tensor(key)) for key in before.keys())  # noqa: SIM118


@pytest.mark.parametrize("form", FORMS)
def test_its_numbers(form):
    found = load("infusion", form).tensors["input_blocks.3.1.transformer_blocks.0.attn2"][:4].tolist()
    assert found == pytest.approx([-0.0921, -0.0560, -0.2245, -0.0062], abs=1e-3)
