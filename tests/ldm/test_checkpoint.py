import hashlib
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.checkpoint import PREFIXES, TensorFile, load_component, load_into, save, sha256
from ldm.text import ClipText, OpenClipText
from ldm.tokenizer import Tokenizer

POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def clip() -> ClipText:
    return ClipText(Tokenizer(merges=0, context_length=6), 8, 16, layers=2, heads=2, max_length=6)


def model() -> SimpleNamespace:
    """What `save` and `load_into` see of a pipeline, with few tensors."""
    unet = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False))
    return SimpleNamespace(unet=unet, vae=nn.Conv2d(3, 4, 1), text=clip(), architecture="tiny")


def modules(pipeline: SimpleNamespace) -> dict[str, nn.Module]:
    return {prefix: getattr(pipeline, name) for name, prefix in PREFIXES.items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def written(tmp_path: Path) -> tuple[SimpleNamespace, Path]:
    pipeline, path = model(), tmp_path / "tiny.safetensors"
    save(path, pipeline, torch.float32)
    return pipeline, path


def rewrite(path: Path, **changes: torch.Tensor | None) -> Path:
    """The file with tensors added or replaced, or left out where None."""
    tensors = {name: t for name, t in {**load_file(path), **changes}.items() if t is not None}
    save_file(tensors, path)
    return path


def test_a_file_has_the_layout_of_ldm(written):
    pipeline, path = written
    names = set(load_file(path))
    assert {"model.diffusion_model.0.weight", "first_stage_model.bias"} < names
    assert "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight" in names
    assert len(names) == 3 + 2 + len(list(pipeline.text.parameters()))


def test_what_is_saved_is_loaded(written):
    pipeline, path = written
    other = model()
    parameters = dict(other.unet.named_parameters())
    assert load_into(modules(other), path) == []
    assert all(same(getattr(pipeline, name), getattr(other, name)) for name in PREFIXES)
    assert all(p is parameters[name] for name, p in other.unet.named_parameters())  # an optimiser still knows them


def test_half_precision_files_load_into_any_precision(written):
    pipeline, path = written
    save(path, pipeline, torch.float16)
    assert {t.dtype for t in load_file(path).values()} == {torch.float16}
    other = model()
    other.unet.to(torch.bfloat16)
    load_into(modules(other), path)
    assert other.vae.weight.dtype == torch.float32 and other.unet[0].weight.dtype == torch.bfloat16
    assert torch.equal(other.vae.weight, pipeline.vae.weight.half().float())


def test_modules_on_the_meta_device_become_real(written):
    pipeline, path = written
    with torch.device("meta"):
        other = model()
    other.vae.requires_grad_(False)
    load_into(modules(other), path)
    assert same(pipeline.text, other.text)
    assert torch.equal(pipeline.text(["ab"]), other.text(["ab"]))
    assert other.unet[0].weight.requires_grad and not other.vae.weight.requires_grad


def test_nothing_is_left_without_a_value(written):
    _, path = written
    with torch.device("meta"):
        other = model()
        other.vae.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(RuntimeError, match="table"):
        load_into(modules(other), path)


def test_a_missing_tensor_is_named_and_nothing_changes(written):
    _, path = written
    rewrite(path, **{"first_stage_model.bias": None})
    other = model()
    before = {name: t.clone() for name, t in other.unet.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 of \d+ expected tensors are missing: first_stage_model.bias"):
        load_into(modules(other), path)
    assert all(torch.equal(t, before[name]) for name, t in other.unet.state_dict().items())


def test_a_wrong_shape_is_named(written):
    _, path = written
    rewrite(path, **{"first_stage_model.bias": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"first_stage_model.bias \(5,\) instead of \(4,\)"):
        load_into(modules(model()), path)


def test_a_text_encoder_under_other_names_is_never_left_random(written):
    """transformers >= 5.6 writes CLIP's text tower without the `text_model` level."""
    _, path = written
    tensors = {name.replace("transformer.text_model.", "transformer."): t for name, t in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match="cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"):
        load_into(modules(model()), path)


def test_other_tensors_are_reported_and_position_ids_are_not(written):
    pipeline, path = written
    extra = {"betas": torch.zeros(3), "model.diffusion_model.2.weight": torch.zeros(1)}
    rewrite(path, **extra, **{POSITION_IDS: torch.arange(6)[None]})
    other = model()
    assert load_into(modules(other), path) == sorted(extra)
    assert same(pipeline.text, other.text)
    assert not any("position_ids" in name for name in load_component(path, PREFIXES["text"]))


def test_one_component(written):
    pipeline, path = written
    component = load_component(path, PREFIXES["vae"])
    assert set(component) == {"weight", "bias"}
    assert torch.equal(component["weight"], pipeline.vae.weight)
    assert load_into({PREFIXES["vae"]: nn.Conv2d(3, 4, 1)}, path)[0].startswith("cond_stage_model.")
    with pytest.raises(ValueError, match="no tensor is named control_model"):
        load_component(path, "control_model.")


def test_scalars_survive(tmp_path):
    """OpenCLIP's `logit_scale` has no dimensions."""
    text = OpenClipText(Tokenizer(merges=0, context_length=6, pad="zero"), 8, layers=2, heads=2, max_length=6)
    pipeline = SimpleNamespace(unet=nn.Linear(1, 1), vae=nn.Linear(1, 1), text=text, architecture="tiny")
    save(tmp_path / "a.safetensors", pipeline, torch.float32)
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert file.shapes["cond_stage_model.model.logit_scale"] == ()
        assert file.read("cond_stage_model.model.logit_scale").item() == pytest.approx(2.6593, abs=1e-4)
    with torch.device("meta"):
        other = OpenClipText(text.tokenizer, 8, layers=2, heads=2, max_length=6)
    load_into({PREFIXES["text"]: other}, tmp_path / "a.safetensors")
    assert torch.equal(other(["ab"]), text(["ab"]))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_ckpt_files_are_read_too(written, tmp_path, nested, zipped):
    pipeline, path = written
    tensors = load_file(path)
    content = {"state_dict": tensors, "global_step": 3} if nested else tensors
    torch.save(content, tmp_path / "tiny.ckpt", _use_new_zipfile_serialization=zipped)
    other = model()
    assert load_into(modules(other), tmp_path / "tiny.ckpt") == []
    assert same(pipeline.unet, other.unet)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("dump", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_runs_no_code(tmp_path, dump):
    dump({"state_dict": {"a": torch.zeros(1)}, "callbacks": Payload(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="evil.ckpt: not a checkpoint that can be read safely"):
        TensorFile(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
@pytest.mark.parametrize("content", [b"", b"<html>404: not found</html>" * 9])
def test_a_file_of_something_else_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not a checkpoint"):
        load_component(tmp_path / name, "model.")


def test_paths_are_checked(tmp_path):
    with pytest.raises(ValueError, match="none.safetensors: no such file"):
        load_component(tmp_path / "none.safetensors", "model.")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        save(tmp_path / "tiny.ckpt", model())


def test_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()
