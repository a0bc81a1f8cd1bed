import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infusion.concepts.concept import Concept
from ldm.pipeline import StableDiffusion
from ldm.weights.checkpoint import save, sha256
from ldm.weights.export import export_diffusers
from ldm.weights.recognise import backbones
from scripts.inspect_file import main


@pytest.fixture
def inspect(capsys):
    def run(path: Path) -> dict:
        main([str(path)])
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def known(tiny, monkeypatch) -> StableDiffusion:
    """The tiny backbone, as if its config were in configs/backbone."""
    node = backbones()["sd15"]
    sd = StableDiffusion.from_checkpoint(tiny)
    from omegaconf import OmegaConf

    from ldm.util.config import load_config

    own = OmegaConf.to_container(load_config(tiny).sd, resolve=True)
    own["params"]["schedule"] = {"target": node["params"]["schedule"]["target"], "params": {}}
    monkeypatch.setattr("ldm.weights.recognise.backbones", lambda: {"tiny": own})
    return sd


def test_a_base_checkpoint(inspect, known, tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, dict(known.named_children()), known.architecture)
    facts = inspect(path)
    numbers = {part: sum(p.numel() for p in getattr(known, part).parameters()) for part in ("unet", "vae", "text")}
    count = len(load_file(path))
    assert facts["kind"] == "base checkpoint" and facts["architecture"] == "tiny"
    assert facts["configs"] == ["configs/backbone/tiny.yaml"]
    assert (facts["prediction_type"], facts["prediction_type_from"]) == ("epsilon", "metadata modelspec.architecture")
    assert facts["tensors"] == count and facts["dtypes"] == {"float16": count} and facts["components"] == numbers
    assert facts["parameters"] == sum(numbers.values())
    assert facts["sha256"] == sha256(path) and facts["bytes"] == path.stat().st_size and not facts["has_ema"]
    assert facts["missing"] == facts["wrong_shapes"] == facts["unexpected"] == []
    extra = {"model_ema.decay": torch.ones(()), "control_model.x": torch.ones(2)}
    damaged = {**load_file(path), **extra, "first_stage_model.quant_conv.bias": torch.ones(1)}
    del damaged["model.diffusion_model.out.0.bias"]
    torch.save({"state_dict": damaged}, tmp_path / "a.ckpt")
    facts = inspect(tmp_path / "a.ckpt")
    assert facts["missing"] == ["model.diffusion_model.out.0.bias"] and facts["unexpected"] == ["control_model.x"]
    assert facts["wrong_shapes"] == ["first_stage_model.quant_conv.bias (1,) instead of (8,)"]
    assert facts["has_ema"] and facts["dtypes"] == {"float16": count - 2, "float32": 3}


def test_a_diffusers_folder(inspect, known, tmp_path):
    export_diffusers(known, tmp_path / "a")
    facts = inspect(tmp_path / "a")
    assert facts["format"] == "folder" and facts["architecture"] == "tiny" and facts["missing"] == []
    assert facts["prediction_type_from"] == "scheduler/scheduler_config.json"
    assert facts["components"]["text"] == sum(p.numel() for p in known.text.parameters())
    assert facts["sha256"] == sha256(tmp_path / "a")


def test_every_form_of_a_concept_shows_the_same(inspect, tmp_path):
    torch.manual_seed(0)
    tensors = {"input_blocks.1.1": torch.randn(400), "middle_block.1": torch.zeros(8)}
    concept = Concept(tensors, "naïve cat", ("a photo of a {}",), "sd15", steps=7)
    facts = {}
    for form, dtype in (("full", "float32"), ("half", "float16"), ("compact", "float32")):
        concept.save(tmp_path / form, form)
        shown = facts[form] = inspect(tmp_path / form)
        assert (shown["kind"], shown["format"], shown["form"]) == ("concept", "safetensors", form)
        assert shown["tensors"] == 2 and shown["parameters"] == 408 and shown["dtypes"] == {dtype: 2}
        assert shown["bytes"] == (tmp_path / form).stat().st_size
        layer = shown["layers"]["input_blocks.1.1"]
        assert layer["shape"] == [400] and layer["dtype"] == dtype
        assert layer["norm"] == pytest.approx(tensors["input_blocks.1.1"].norm().item(), rel=1e-3)
        assert shown["layers"]["middle_block.1"] == {"shape": [8], "dtype": dtype, "norm": 0.0}
    said = {"format": "infusion-concept", "format_version": "1", "layers": json.dumps(list(tensors))}
    assert facts["half"]["metadata"] == facts["full"]["metadata"] == concept.metadata() | said
    assert facts["compact"]["metadata"] == facts["full"]["metadata"] | {"format_version": "2", "form": "compact"}
    (tmp_path / "compact").write_bytes((tmp_path / "compact").read_bytes()[:-1])
    with pytest.raises(SystemExit):
        inspect(tmp_path / "compact")


def test_a_concept_of_the_released_code(inspect, tmp_path):
    torch.save({"target_output": {"middle_block.1.attn2.to_v.target_output": torch.ones(4)}}, tmp_path / "a.ckpt")
    facts = inspect(tmp_path / "a.ckpt")
    assert facts["kind"] == "released concept" and "convert_concept.py" in facts["says"]


def test_tensors_do_not_tell_what_sd_2_predicts(inspect, tmp_path):
    prefix = "model.diffusion_model."
    shapes = {prefix + "input_blocks.0.0.weight": (320, 4, 3, 3), prefix + "x.attn2.to_k.weight": (1, 1024)}
    shapes |= {"first_stage_model.x": (1,), "cond_stage_model.x": (1,)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
    facts = inspect(tmp_path / "a.safetensors")
    assert facts["prediction_type"] == "unknown" and facts["prediction_type_from"] is None
    assert facts["configs"] == ["configs/backbone/sd21.yaml", "configs/backbone/sd21_768.yaml"]
    assert len(facts["missing"]) > 1000 and facts["unexpected"] == sorted(set(shapes) - {next(iter(shapes))})


class Evil:
    def __reduce__(self):
        return eval, ("1",)


@pytest.mark.parametrize("content", [None, b"", b"<html>404</html>", pickle.dumps(Evil())])
def test_what_cannot_be_read_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "a.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main([str(path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(f"error: {path}: ")


def test_a_lora_of_another_tool(inspect, tmp_path):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 768), f"{name}.lora_up.weight": torch.ones(1280, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.trigger_phrase": "sks dog", "ss_steps": "80"})
    facts = inspect(tmp_path / "a.safetensors")
    found = facts["as_concept"]
    assert facts["kind"] == found["method"] == "lora" and found["architecture"] == "sd15" and found["steps"] == 80
    assert found["noun"] == "sks dog" and found["tensors"] == 2
    save_file({**tensors, f"{name}.dora_scale": torch.ones(1280)}, tmp_path / "a.safetensors")
    assert "DoRA" in inspect(tmp_path / "a.safetensors")["as_concept"]["refused"]
