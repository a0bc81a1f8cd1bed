import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.models.text import ClipText, OpenClipText
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNet
from ldm.pipeline import StableDiffusion
from ldm.weights.checkpoint import PREFIXES, load_component, load_into, save, sha256, write
from ldm.weights.diffusers_layout import unrun
from ldm.weights.export import export_diffusers
from ldm.weights.files import TensorFile
from ldm.weights.names import ema_name

POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def clip() -> ClipText:
    return ClipText(Tokenizer(merges=0, context_length=6), 8, 16, layers=2, heads=2, max_length=6)


def model() -> SimpleNamespace:
    """What `save` and `load_into` see of a pipeline, with few tensors."""
    unet = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False))
    return SimpleNamespace(unet=unet, vae=nn.Conv2d(3, 4, 1), text=clip())


def modules(pipeline: SimpleNamespace) -> dict[str, nn.Module]:
    return {prefix: getattr(pipeline, name) for name, prefix in PREFIXES.items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def written(tmp_path: Path) -> tuple[SimpleNamespace, Path]:
    pipeline, path = model(), tmp_path / "tiny.safetensors"
    save(path, vars(pipeline), "tiny", torch.float32)
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
    save(path, vars(pipeline), "tiny", torch.float16)
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


def test_clip_loads_from_both_layouts_of_transformers(written):
    """transformers >= 5.6 writes CLIP's text tower without the `text_model` level; the values must not be lost."""
    pipeline, path = written
    tensors = {name.replace("transformer.text_model.", "transformer."): t for name, t in load_file(path).items()}
    assert not any("text_model" in name for name in tensors)
    save_file(tensors, path)
    other = model()
    assert not same(pipeline.text, other.text)
    assert load_into(modules(other), path) == []
    assert same(pipeline.text, other.text) and torch.equal(pipeline.text(["ab"]), other.text(["ab"]))


def test_a_text_encoder_under_other_names_is_never_left_random(written):
    _, path = written
    tensors = {name.replace("transformer.text_model.", "transformer.tower."): t for name, t in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match="cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"):
        load_into(modules(model()), path)


def test_other_tensors_are_reported_and_what_old_files_always_have_is_not(written):
    pipeline, path = written
    extra = {"control_model.weight": torch.zeros(3), "model.diffusion_model.2.weight": torch.zeros(1)}
    usual = {"betas": torch.zeros(3), "alphas_cumprod": torch.zeros(3), "model_ema.decay": torch.tensor(0.9)}
    positions = {POSITION_IDS: torch.arange(6)[None], "text_model.embeddings.position_ids": torch.arange(6)[None]}
    rewrite(path, **extra, **usual, **positions)
    other = model()
    assert load_into(modules(other), path) == sorted(extra)
    assert same(pipeline.text, other.text)
    assert not any("position_ids" in name for name in load_component(path, PREFIXES["text"]))


AVERAGED = ("model_ema.diffusion_model0weight", "model_ema.diffusion_model0bias", "model_ema.diffusion_model1weight")


def with_averages(path: Path) -> dict[str, torch.Tensor]:
    averages = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}
    averages |= dict(zip(AVERAGED, (torch.randn(3, 2), torch.randn(3), torch.randn(2, 3)), strict=True))
    rewrite(path, **averages)
    return averages


def test_averaged_weights_are_taken_when_asked_for(written):
    pipeline, path = written
    averages = with_averages(path)
    plain, averaged = model(), model()
    assert load_into(modules(plain), path) == load_into(modules(averaged), path, use_ema=True) == []
    assert same(plain.unet, pipeline.unet)
    assert all(torch.equal(t, averages[n]) for t, n in zip(averaged.unet.parameters(), AVERAGED, strict=True))
    assert same(averaged.vae, pipeline.vae) and same(averaged.text, pipeline.text)
    rewrite(path, **{"model.diffusion_model.0.weight": None})  # averages alone will do
    load_into(modules(averaged), path, use_ema=True)


def test_configs_and_callers_may_ask_for_averages(tiny, tmp_path):
    tensors = load_file(tiny.with_suffix(".safetensors"))
    start = PREFIXES["unet"]
    averages = {ema_name(n.removeprefix(start)): t + 1 for n, t in tensors.items() if n.startswith(start)}
    path = tmp_path / "averaged.safetensors"
    save_file(tensors | averages | {"model_ema.decay": torch.tensor(0.9)}, path)
    plain = StableDiffusion.from_checkpoint(tiny, path)
    averaged = StableDiffusion.from_checkpoint(tiny, path, use_ema=True)
    shutil.copyfile(tiny, tmp_path / "tiny.yaml")
    (tmp_path / "ema.yaml").write_text("include: tiny.yaml\nuse_ema: true\n")
    configured = StableDiffusion.from_checkpoint(tmp_path / "ema.yaml", path)
    assert same(averaged.unet, configured.unet) and same(plain.text, averaged.text)
    assert same(plain.unet, StableDiffusion.from_checkpoint(tmp_path / "ema.yaml", path, use_ema=False).unet)
    assert all(torch.equal(a, p + 1) for a, p in zip(averaged.unet.parameters(), plain.unet.parameters(), strict=True))
    with pytest.raises(ValueError, match="no averaged weights"):
        StableDiffusion.from_checkpoint(tmp_path / "ema.yaml")


def test_training_starts_from_averages_and_from_folders(tiny, tmp_path):
    from ldm.training import setup  # not above: it brings in Lightning

    sd = StableDiffusion.from_checkpoint(tiny)
    export_diffusers(sd, tmp_path / "diffusers")
    config = OmegaConf.create({"ckpt": str(tmp_path / "diffusers"), "parts": {}, "use_ema": False})
    with torch.device("meta"):
        other = StableDiffusion.from_config(tiny)
    setup.load_weights(other, config)
    assert same(sd, other)
    with pytest.raises(ValueError, match="no averaged weights"):
        setup.load_weights(other, OmegaConf.merge(config, {"use_ema": True}))


def test_averaged_weights_must_all_be_there(written):
    _, path = written
    with pytest.raises(ValueError, match="no averaged weights"):
        load_into(modules(model()), path, use_ema=True)
    with_averages(path)
    rewrite(path, **{AVERAGED[1]: None})
    with pytest.raises(ValueError, match=f"1 of .* missing: {AVERAGED[1]}"):
        load_into(modules(model()), path, use_ema=True)


def test_no_two_tensors_of_a_unet_share_an_average():
    with torch.device("meta"):
        names = list(UNet(num_heads=8, context_dim=768).state_dict())
    assert "model_ema.diffusion_modelinput_blocks00weight" in map(ema_name, names)
    assert "model_ema.diffusion_modeloutput_blocks111transformer_blocks0attn2to_out0bias" in map(ema_name, names)
    assert len(set(map(ema_name, names))) == len(names)


def test_a_damaged_file_changes_nothing_and_says_what_it_looks_like(written):
    _, path = written
    rewrite(path, **{"first_stage_model.bias": None})
    with pytest.raises(ValueError) as error:
        load_into(modules(model()), path)
    assert "; it looks like a base checkpoint that no backbone here fits" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_openclip_never_runs_may_be_missing(tmp_path):
    """diffusers stores neither the last layer nor the projection, nor do files made from its folders."""
    text = OpenClipText(Tokenizer(merges=0, context_length=6, pad="zero"), 8, layers=3, heads=2, max_length=6)
    stored = {PREFIXES["text"] + name: t for name, t in text.state_dict().items() if name not in unrun(text)}
    assert len(unrun(text)) == 12 + 2 and len(stored) == 2 * 12 + 4
    save_file(stored, tmp_path / "a.safetensors")
    with torch.device("meta"):
        other = OpenClipText(text.tokenizer, 8, layers=3, heads=2, max_length=6)
    assert load_into({PREFIXES["text"]: other}, tmp_path / "a.safetensors") == []
    assert torch.equal(other(["ab"]), text(["ab"]))
    assert all(not t.any() for name, t in other.state_dict().items() if name in unrun(text))
    del stored[PREFIXES["text"] + "model.transformer.resblocks.1.ln_1.bias"]
    save_file(stored, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="1 of .* missing: cond_stage_model.model.transformer.resblocks.1.ln_1.bias"):
        load_into({PREFIXES["text"]: other}, tmp_path / "a.safetensors")


PEAK = """
import ctypes, gc, sys, torch
from torch import nn
from ldm.weights.checkpoint import load_into

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def peak(path, wanted):
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(2816, 2816, bias=False) for _ in range(10))).to(getattr(torch, wanted))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the highest so far
    before = status("VmRSS")
    assert load_into({"": module}, path) == []
    return status("VmHWM") - before

for case in sys.argv[1:]:
    print(peak(*case.split(",")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_takes_little_more_memory_than_the_model_or_the_file(tmp_path):
    cases = {}  # arguments -> bytes that it may take, bytes of the model
    for stored in ("float32", "float16"):
        weights = {f"{i}.weight": torch.full((2816, 2816), i, dtype=getattr(torch, stored)) for i in range(10)}
        for ending in ("safetensors", "ckpt"):
            path = tmp_path / f"{stored}.{ending}"
            save_file(weights, path) if ending == "safetensors" else torch.save(weights, path)
            for wanted in ("float32", "float16"):
                size = 10 * 2816**2 * getattr(torch, wanted).itemsize
                held = path.stat().st_size if ending == "ckpt" else 0  # mapped pages, which the system may take back
                cases[f"{path},{wanted}"] = (size + max(held, 0.3 * path.stat().st_size), size)
    command = [sys.executable, "-c", PEAK, *cases]
    result = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    peaks = dict(zip(cases, map(int, result.stdout.split()), strict=True))
    for case, (limit, size) in cases.items():
        assert 0.95 * size < peaks[case] < 1.1 * limit, (case, peaks[case] / limit)


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
    pipeline = SimpleNamespace(unet=nn.Linear(1, 1), vae=nn.Linear(1, 1), text=text)
    save(tmp_path / "a.safetensors", vars(pipeline), "tiny", torch.float32)
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


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
@pytest.mark.parametrize("content", [b"", b"<html>404: not found</html>" * 9])
def test_a_file_of_something_else_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: not a file of tensors"):
        load_component(tmp_path / name, "model.")


def test_paths_are_checked(tmp_path):
    with pytest.raises(ValueError, match="none.safetensors: no such file"):
        load_component(tmp_path / "none.safetensors", "model.")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        save(tmp_path / "tiny.ckpt", vars(model()), "tiny")


def test_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_file_has_the_same_bytes_whatever_the_order_of_its_metadata(tmp_path):
    words = {f'key {i} é\n\x01"\\/': f"value {i} ∑" for i in range(20)}
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.float16)}
    write(tmp_path / "one.safetensors", tensors, words)
    write(tmp_path / "two.safetensors", tensors, dict(reversed(words.items())))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    with safe_open(tmp_path / "two.safetensors", "pt") as file:
        assert file.metadata() == words | {"format": "pt"}
        assert torch.equal(file.get_tensor("b"), tensors["b"]) and torch.equal(file.get_tensor("a"), tensors["a"])
