import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from infusion.concepts.concept import Concept
from infusion.gate import Gate

LAYERS = ["middle_block.1.transformer_blocks.0.attn2", "input_blocks.1.1.transformer_blocks.0.attn2"]


@pytest.fixture
def concept():
    torch.manual_seed(0)
    return Concept(
        tensors={LAYERS[0]: torch.randn(64), LAYERS[1]: torch.randn(32)},
        superclass="stuffed animal",
        templates=("a photo of a {}", 'the "{}" · naïve'),
        architecture="sd15",
        base_hash="ab" * 32,
        gate=Gate("global", 0.75, 0.1),
        covariance="cd" * 32,
        attention="own",
        steps=500,
        learning_rate=0.01,
        seed=7,
        date="2024-05-01T12:00:00+00:00",
    )


def test_round_trip(concept, tmp_path):
    path = tmp_path / "models" / "step=000500.safetensors"
    concept.save(path)
    loaded = Concept.load(path)
    assert loaded.metadata() == concept.metadata()
    assert list(loaded.tensors) == LAYERS
    assert all(torch.equal(loaded.tensors[name], concept.tensors[name]) for name in LAYERS)
    assert loaded.gate == concept.gate and loaded.templates == concept.templates
    assert loaded.numbers == 96
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_the_batch_is_kept_where_it_is_known(concept, tmp_path):
    concept.save(tmp_path / "old.safetensors")
    assert "batch_size" not in concept.metadata() and Concept.load(tmp_path / "old.safetensors").batch_size == 0
    replace(concept, batch_size=16).save(tmp_path / "new.safetensors")
    assert Concept.load(tmp_path / "new.safetensors").batch_size == 16


def test_file_is_readable_by_others(concept, tmp_path):
    concept.save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        metadata, tensor = file.metadata(), file.get_tensor(LAYERS[1])
    assert tensor.dtype == torch.float32 and tensor.shape == (32,)
    assert metadata["format"] == "infusion-concept" and metadata["format_version"] == "1"
    assert metadata["gate"] == "global" and float(metadata["beta"]) == 0.75 and float(metadata["tau"]) == 0.1
    assert metadata["base_architecture"] == "sd15" and metadata["base_sha256"] == "ab" * 32
    assert json.loads(metadata["trained_words"]) == ["stuffed animal"]
    assert json.loads(metadata["layers"]) == LAYERS
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/infusion"
    assert metadata["modelspec.trigger_phrase"] == "stuffed animal"


def test_half_precision_files_load_as_float32(concept, tmp_path):
    path = tmp_path / "c.safetensors"
    concept.save(path, "half")
    assert {name: tensor.dtype for name, tensor in load_file(path).items()} == dict.fromkeys(LAYERS, torch.float16)
    loaded = Concept.load(path)
    assert all(torch.equal(loaded.tensors[name], concept.tensors[name].half().float()) for name in LAYERS)
    assert loaded.metadata() == concept.metadata() and 0 < loaded.relative_error(concept) < 2**-11
    loaded.save(path, "half")
    assert Concept.load(path).relative_error(loaded) == 0


def test_a_form_that_cannot_hold_the_numbers_is_refused(concept, tmp_path):
    large = replace(concept, tensors={LAYERS[0]: torch.tensor([1e6, 1.0])})
    with pytest.raises(ValueError, match="float16 does not reach"):
        large.save(tmp_path / "c.safetensors", "half")
    with pytest.raises(ValueError, match="full, half, compact"):
        concept.save(tmp_path / "c.safetensors", "tiny")
    assert not list(tmp_path.iterdir())
    large.save(tmp_path / "c.safetensors", "compact")
    assert Concept.load(tmp_path / "c.safetensors").tensors[LAYERS[0]][0] == pytest.approx(1e6, rel=0.01)


def test_relative_error(concept):
    doubled = replace(concept, tensors={name: 2 * tensor for name, tensor in concept.tensors.items()})
    zero = replace(concept, tensors={name: 0 * tensor for name, tensor in concept.tensors.items()})
    assert doubled.relative_error(concept) == 1 and concept.relative_error(doubled) == 0.5
    assert zero.relative_error(zero) == 0 and concept.relative_error(zero) == float("inf")
    with pytest.raises(ValueError, match="different layers"):
        concept.relative_error(replace(concept, tensors={LAYERS[0]: torch.zeros(64)}))


def test_a_failed_save_leaves_the_old_file(concept, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    concept.save(path)
    old = path.read_bytes()

    def broken(partial, content):
        with partial.open("wb") as file:
            file.write(content[:9])
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_bytes", broken)
    with pytest.raises(OSError, match="disk full"):
        concept.save(path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("keep", [0, 5, 200, -3])
def test_truncated_files_are_errors(concept, tmp_path, keep):
    path = tmp_path / "c.safetensors"
    concept.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="c.safetensors: not a file of tensors"):
        Concept.load(path)


def test_other_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no such concept file"):
        Concept.load(tmp_path / "missing.safetensors")
    save_file({"weight": torch.zeros(3)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="no concept file"):
        Concept.load(tmp_path / "lora.safetensors")


def test_check_base(concept):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        concept.check_base("sd15", "ab" * 32)
    with pytest.warns(UserWarning, match="another checkpoint"):
        concept.check_base("sd15", "00" * 32)
    with pytest.warns(UserWarning, match="here unknown"):
        concept.check_base("sd15", None)
    with pytest.raises(ValueError, match="sd21"):
        concept.check_base("sd21", "ab" * 32)
    unknown = replace(concept, architecture="sd21", base_hash=None)
    with pytest.warns(UserWarning, match="may have been trained on another checkpoint"):
        unknown.check_base("sd21_768", "ab" * 32)  # its tensors are the same
    with pytest.raises(ValueError, match="does not fit"):
        replace(unknown, base_hash="ab" * 32).check_base("sd21_768", "ab" * 32)


def test_the_base_of_a_concept_may_be_averaged_and_of_parts(concept, tmp_path):
    assert not {"base_use_ema", "base_parts"} & concept.metadata().keys()  # files stay as they were
    path = tmp_path / "c.safetensors"
    for form in ("full", "compact"):
        made = replace(concept, base_use_ema=True, base_parts={"vae": "cd" * 32, "text": "ef" * 32})
        made.save(path, form)
        loaded = Concept.load(path)
        assert loaded.base_use_ema and loaded.base_parts == {"vae": "cd" * 32, "text": "ef" * 32}
        with pytest.warns(UserWarning, match=r"its own has --use_ema and --part text=FILE \(sha256 efef"):
            loaded.check_base("sd15", "00" * 32)
