"""Files of SDXL's layout in all their variants, at pocket size: they give the same model, or are refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.pipeline import StableDiffusion
from ldm.weights.checkpoint import save
from ldm.weights.export import export_diffusers
from ldm.weights.names import ema_name
from ldm.weights.recognise import inspect

FIRST, SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
PROJECTION = SECOND + "text_projection"
UNET = "model.diffusion_model."
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def config(configs) -> Path:
    return configs / "pocket_xl.yaml"


@pytest.fixture(scope="module")
def sd(config) -> StableDiffusion:
    torch.manual_seed(0)
    return StableDiffusion.from_config(config).requires_grad_(False)


@pytest.fixture(scope="module")
def tensors(sd, tmp_path_factory) -> Tensors:
    path = tmp_path_factory.mktemp("xl") / "a.safetensors"
    save(path, dict(sd.named_children()), sd.architecture, torch.float32)
    return load_file(path)


def without(tensors: Tensors, *ends: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


def loaded(config: Path, tensors: Tensors, folder: Path, metadata: dict | None = None, **options) -> StableDiffusion:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "b.safetensors", metadata)
    return StableDiffusion.from_checkpoint(config, folder / "b.safetensors", **options)


def test_the_names_are_the_published_ones(tensors):
    starts = {".".join(name.split(".")[:3]) for name in tensors if name.startswith("conditioner.")}
    assert starts == {"conditioner.embedders.0", "conditioner.embedders.1"}
    assert FIRST + "text_model.encoder.layers.0.mlp.fc1.weight" in tensors and PROJECTION in tensors
    assert UNET + "label_emb.0.2.bias" in tensors and not any(name.startswith("cond_stage") for name in tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: without(t, "logit_scale", "position_ids"),
        lambda t: {name.replace(f"{FIRST}text_model.", FIRST): tensor for name, tensor in t.items()},
        lambda t: without(t, "text_projection") | {PROJECTION + ".weight": t[PROJECTION].mT},
        lambda t: t | {FIRST + "text_model.embeddings.position_ids": torch.arange(32.0)[None]},
        lambda t: t | {SECOND + "transformer.text_model.embeddings.position_ids": torch.arange(32)[None]},
    ],
)
def test_variants_give_the_same_model(config, sd, tensors, change, tmp_path, recwarn):
    back = loaded(config, change(tensors), tmp_path)
    unused = "text.embedders.1.model.logit_scale"
    state = back.state_dict()
    assert [name for name, t in sd.state_dict().items() if name != unused and not torch.equal(t, state[name])] == []
    assert not [warning for warning in recwarn if "no place" in str(warning.message)]


def test_half_precision_and_averages_load(config, sd, tensors, tmp_path):
    back = loaded(config, {name: tensor.half() for name, tensor in tensors.items()}, tmp_path)
    assert all(torch.equal(t, sd.state_dict()[name].half().float()) for name, t in back.state_dict().items())
    names = [name for name in tensors if name.startswith(UNET)]
    averages = {ema_name(name.removeprefix(UNET)): tensors[name] + 1 for name in names}
    back = loaded(config, tensors | averages, tmp_path, use_ema=True)
    assert all(torch.equal(t, sd.unet.state_dict()[name] + 1) for name, t in back.unet.state_dict().items())
    assert torch.equal(back.text.embedders[1].model.text_projection, sd.text.embedders[1].model.text_projection)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {n: v for n, v in t.items() if n.startswith(UNET)}, "are missing.*it looks like a UNet alone"),
        (lambda t: {n: v for n, v in t.items() if not n.startswith(FIRST)}, f"are missing: {FIRST}"),
        (lambda t: without(t, "text_projection"), f"1 of .* are missing: {PROJECTION}"),
        (lambda t: without(t, UNET + "label_emb.0.0.weight"), "1 of .* are missing: .*label_emb"),
        (lambda t: t | {"v_pred": torch.zeros(0)}, "predicts v_prediction, pocket_xl predicts epsilon .the key v_pred"),
        (lambda t: t | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, "zero terminal SNR"),
        (lambda t: t | {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, "Playground 2.5"),
        (lambda t: t | {"edm_vpred.sigma_max": torch.ones(1)}, "CosXL"),
        (lambda t: t | {UNET + "out.2.weight_scale": torch.ones(1)}, "8 bits with scales"),
        (lambda t: t | {n: torch.zeros(len(v), 1280) for n, v in t.items() if "attn2.to_k" in n}, "SDXL's refiner"),
        (lambda t: t | {UNET + "input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "an inpainting model"),
    ],
)  # fmt: skip
def test_what_is_something_else_is_refused_by_its_name(config, tensors, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        loaded(config, change(tensors), tmp_path)


def test_what_the_metadata_say_of_the_prediction_counts(config, tensors, tmp_path):
    loaded(config, tensors, tmp_path, {"modelspec.prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="predicts v_prediction, .*metadata modelspec.predict_key"):
        loaded(config, tensors, tmp_path, {"modelspec.predict_key": "v"})


def test_a_part_of_its_own_is_checked_too(config, tensors, tmp_path):
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith(UNET)}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(unet | {"v_pred": torch.zeros(0)}, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="predicts v_prediction"):
        StableDiffusion.from_checkpoint(
            config, tmp_path / "a.safetensors", parts={"unet": tmp_path / "unet.safetensors"}
        )
    text = {name: tensor + 1 for name, tensor in tensors.items() if name.startswith("conditioner.")}
    save_file(text, tmp_path / "text.safetensors")
    sd = StableDiffusion.from_checkpoint(
        config, tmp_path / "a.safetensors", parts={"text": tmp_path / "text.safetensors"}
    )
    assert torch.equal(sd.text.embedders[1].model.text_projection, tensors[PROJECTION] + 1)


def test_a_file_and_a_folder_are_inspected_alike(sd, tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    export_diffusers(sd, tmp_path / "a")
    file, folder = inspect(tmp_path / "a.safetensors"), inspect(tmp_path / "a")
    for facts in (file, folder):
        assert (facts["kind"], facts["architecture"]) == ("base checkpoint", "pocket_xl")
        assert facts["missing"] == facts["wrong_shapes"] == facts["unexpected"] == []
    numbers = {name: sum(t.numel() for t in getattr(sd, name).parameters()) for name in ("unet", "vae", "text")}
    assert file["components"] == numbers
    assert folder["components"] == numbers | {"text": numbers["text"] - 1}  # without logit_scale


def scheduler(folder: Path, **settings: object) -> None:
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "text_encoder_2/model.safetensors").unlink(), "missing: text_encoder_2/"),
        (lambda folder: scheduler(folder, prediction_type="v_prediction"), "its UNet predicts v_prediction"),
        (lambda folder: scheduler(folder, rescale_betas_zero_snr=True), "zero terminal SNR"),
        (lambda folder: scheduler(folder, _class_name="EDMDPMSolverMultistepScheduler"), "Playground 2.5"),
    ],
)
def test_folders_that_are_something_else_are_refused(
    config, sd, damage: Callable[[Path], None], message, tmp_path
):  # fmt: skip
    export_diffusers(sd, tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        StableDiffusion.from_checkpoint(config, tmp_path / "a")


def test_folders_of_every_age_load_alike(config, sd, tmp_path):
    """transformers 5.6 and later write CLIPTextModel without the level `text_model`, the other one with it."""
    export_diffusers(sd, tmp_path / "a")
    expected = StableDiffusion.from_checkpoint(config, tmp_path / "a")
    for part in ("text_encoder", "text_encoder_2"):
        path = tmp_path / "a" / part / "model.safetensors"
        renamed = {name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
        save_file(renamed, path)
    back = StableDiffusion.from_checkpoint(config, tmp_path / "a").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in expected.state_dict().items())
