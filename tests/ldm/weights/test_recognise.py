from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ldm.models.unet import UNet
from ldm.pipeline import StableDiffusion
from ldm.util.defaults import PAIR
from ldm.weights.checkpoint import load_into
from ldm.weights.files import TensorFile
from ldm.weights.names import PREFIXES, match, prefix_of
from ldm.weights.recognise import CONCEPT, backbones, recognise, refusal, stated_prediction

MANIFESTS = Path(__file__).parents[1] / "manifests"
CONFIG = Path(__file__).parents[3] / "configs/backbone/sdxl.yaml"
UNET, VAE, TEXT = PREFIXES.values()
WIDTHS = {"input_blocks.0.0.weight": (8, 4, 3, 3), "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 6)}


def manifest(name: str, prefix: str) -> dict[str, tuple[int, ...]]:
    lines = (line.split(" ") for line in (MANIFESTS / f"{name}.txt").read_text().splitlines())
    return {prefix + name: tuple(int(n) for n in shape.strip("[]").split(",") if n) for name, shape in lines}


def published(version: int) -> dict[str, tuple[int, ...]]:
    level = TEXT + ("transformer.text_model." if version == 1 else "model.")
    names = {UNET: f"UNET-v{version}-SD", VAE: "VAE-v1-SD", level: f"CLIP-v{version}-SD"}
    return {key: shape for prefix, name in names.items() for key, shape in manifest(name, prefix).items()}


def file(shapes: dict, top: tuple[str, ...] = (), **metadata: str) -> SimpleNamespace:
    """What `recognise` sees of a file."""
    return SimpleNamespace(shapes=shapes, metadata=metadata, content=dict.fromkeys(top))


def test_the_published_checkpoints_are_recognised():
    kind = recognise(file(published(1)))
    assert kind.name == "base checkpoint" and kind.architectures == ("sd15",)
    assert kind.says == "SD 1.5; use configs/backbone/sd15.yaml"
    kind = recognise(file(published(2)))
    assert kind.architectures == ("sd21", "sd21_768")  # their tensors are the same
    assert kind.says == (
        "SD 2.1; use configs/backbone/sd21.yaml if it predicts ε (trained at 512 pixels) "
        "or configs/backbone/sd21_768.yaml if it predicts v (trained at 768 pixels)"
    )


def sdxl() -> dict[str, tuple[int, ...]]:
    names = {UNET: "UNET-XL-SD", VAE: "VAE-v1-SD", f"{PAIR}embedders.0.transformer.text_model.": "CLIP-v1-SD",
             f"{PAIR}embedders.1.model.": "OPENCLIP-XL-SD"}  # fmt: skip
    return {key: shape for prefix, name in names.items() for key, shape in manifest(name, prefix).items()}


def test_sdxl_is_recognised_and_every_published_tensor_has_its_place():
    kind = recognise(file(sdxl()))
    assert kind.architectures == ("sdxl",) and kind.says == "SDXL 1.0; use configs/backbone/sdxl.yaml"
    with torch.device("meta"):
        sd = StableDiffusion.from_config(CONFIG)
    modules = {prefix_of(name, module): module for name, module in sd.named_children()}
    assert list(modules) == [UNET, VAE, PAIR] and len(sdxl()) == 2515
    found = match(file(sdxl()), modules)
    assert (found.missing, found.wrong, found.unexpected) == ([], [], [])
    assert found.expected == 2514  # position_ids are a constant
    assert all(len(stored) == 1 for names in found.sources.values() for stored in names.values())


PROJECTION = f"{PAIR}embedders.1.model.text_projection"
LEVEL = f"{PAIR}embedders.0.transformer."


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {name: shape for name, shape in s.items() if not name.endswith(("position_ids", "logit_scale"))},
        lambda s: {name.replace(f"{LEVEL}text_model.", LEVEL): shape for name, shape in s.items()},
        lambda s: {PROJECTION + ".weight" if name == PROJECTION else name: shape for name, shape in s.items()},
        lambda s: s | {f"{PAIR}embedders.1.model.transformer.text_model.embeddings.position_ids": (1, 77)},
    ],
)
def test_variants_of_sdxl_have_a_place_for_every_tensor_too(change):
    with torch.device("meta"):
        sd = StableDiffusion.from_config(CONFIG)
    shapes = change(sdxl())
    found = match(file(shapes), {prefix_of(name, module): module for name, module in sd.named_children()})
    assert (found.missing, found.wrong, found.unexpected) == ([], [], [])


CROSS = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    "added, says",
    [
        ({UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)}, "an inpainting model: 9 input channels"),
        ({UNET + CROSS: (640, 1280)}, "SDXL's refiner, which takes no concepts"),
        ({"edm_mean": (4,), "edm_std": (4,)}, "EDM's noise levels, such as Playground 2.5"),
        ({"edm_vpred.sigma_max": (1,), "edm_vpred.sigma_min": (1,)}, "CosXL"),
        ({"v_pred": (0,), "ztsnr": (0,)}, "zero terminal SNR"),
        ({UNET + "out.2.scale_weight": ()}, "8 bits with scales"),
        ({"scaled_fp8": (0,)}, "8 bits with scales"),
    ],
)
def test_relatives_of_sdxl_are_called_by_their_names(added, says):
    changed = sdxl() | added
    if "refiner" in says:
        changed = {name: (1, 1280) if "attn2.to_k" in name else shape for name, shape in changed.items()}
    assert says in recognise(file(changed)).says
    assert (refusal(file(changed)) is None) == ("inpainting" in says)


def test_what_an_sdxl_predicts_may_be_said_by_keys_and_metadata():
    assert stated_prediction(file(sdxl())) == (None, None)
    assert stated_prediction(file(sdxl() | {"v_pred": (0,)})) == ("v_prediction", "the key v_pred")
    for key, value in (("prediction_type", "v"), ("predict_key", "v"), ("prediction_type", "epsilon")):
        known = {"v": "v_prediction"}.get(value, value)
        assert stated_prediction(file(sdxl(), **{f"modelspec.{key}": value})) == (known, f"metadata modelspec.{key}")


def test_relatives_of_the_published_checkpoints_are_told_apart():
    inpainting = published(1) | {UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)}
    assert "an inpainting model: 9 input channels" in recognise(file(inpainting)).says
    other = published(1) | {UNET + "input_blocks.0.0.weight": (256, 4, 3, 3)}
    assert "that no backbone here fits: 4 input channels, width 256, text of width 768" in recognise(file(other)).says


@pytest.mark.parametrize(
    "shapes, name, says",
    [
        ({UNET + name: shape for name, shape in WIDTHS.items()}, "unet", "a UNet alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": (8,), "conv_in.weight": (8,)}, "diffusers unet",
         "a diffusers UNet file alone"),
        ({"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048)}, "diffusers unet", "alone"),
        ({"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 1280)}, "other", "refiner"),
        ({"lora_unet_mid_block.lora_up.weight": (8, 4)}, "lora", "a LoRA"),
        ({"unet.down_blocks.0.to_k.lora_A.weight": (4, 8)}, "lora", "a LoRA"),
        ({"mid_block.attn1.processor.to_q_lora.down.weight": (4, 8)}, "lora", "a LoRA"),
        ({"unet:0:up": (8, 4), "unet:0:down": (4, 8), "<s1>": (768,)}, "lora", "a LoRA"),
        ({"0": (8, 4), "1": (4, 6), "2": (7, 1), "3": (1, 9)}, "lora", "a LoRA"),
        ({"0": (8, 4), "1": (5, 6)}, "unknown", "its tensors begin with 0, 1"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "textual inversion", "a textual inversion embedding"),
        ({"conditioner.embedders.1.model.ln_final.bias": (8,)}, "text encoder", "a text encoder alone"),
        ({"emb_params": (2, 768)}, "textual inversion", "a textual inversion embedding"),
        ({"<cat>": (768,)}, "textual inversion", "a textual inversion embedding"),
        ({VAE + "quant_conv.weight": (8, 8, 1, 1)}, "vae", "a VAE alone"),
        ({"encoder.down.0.block.0.conv1.weight": (8,), "decoder.conv_in.weight": (8,)}, "vae", "a VAE alone"),
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": (8,)}, "vae", "a VAE alone"),
        ({"text_model.final_layer_norm.weight": (8,)}, "text encoder", "a CLIP text encoder alone"),
        ({"control_model.zero_convs.0.0.weight": (8,)}, "controlnet", "a ControlNet"),
        ({"double_blocks.0.img_attn.proj.weight": (8,)}, "other", "FLUX"),
        ({"body.0.weight": (8,), "heads.x": (3,)}, "unknown", "its tensors begin with body, heads"),
        ({}, "unknown", "it has no tensors"),
    ],
)  # fmt: skip
def test_other_files_are_called_by_their_names(shapes, name, says):
    kind = recognise(file(shapes))
    assert kind.name == name and says in kind.says


def test_what_is_around_the_tensors_counts():
    kind = recognise(file({"input_blocks.1.1": (320,)}, format=CONCEPT))
    assert kind.name == "concept" and "pass it as --personalized_ckpt" in kind.says
    assert recognise(file({}, top=("string_to_token", "string_to_param"))).name == "textual inversion"
    state = recognise(file({"x.weight": (1,)}, top=("epoch", "pytorch-lightning_version", "state_dict")))
    assert state.name == "training state"


def test_an_old_embedding_is_recognised_in_its_pickle(tmp_path):
    content = {"string_to_token": {"*": 265}, "string_to_param": torch.nn.ParameterDict({"*": torch.ones(1, 768)})}
    torch.save(content, tmp_path / "cat.pt")
    with TensorFile(tmp_path / "cat.pt") as found:
        assert recognise(found).name == "textual inversion"
        assert found.shapes == {"*": (1, 768)} and torch.equal(found.read("*"), torch.ones(1, 768))
    torch.save(content | {"string_to_param": {"*": torch.ones(2, 768)}}, tmp_path / "cat.pt")
    with TensorFile(tmp_path / "cat.pt") as found:
        assert found.shapes == {"*": (2, 768)}


def test_a_list_of_factors_is_recognised_in_its_pickle(tmp_path):
    torch.save([torch.ones(8, 2), torch.zeros(2, 6)], tmp_path / "a.pt")
    with TensorFile(tmp_path / "a.pt") as found:
        assert recognise(found).name == "lora"
        assert found.shapes == {"0": (8, 2), "1": (2, 6)} and torch.equal(found.read("1"), torch.zeros(2, 6))


def test_a_file_of_another_architecture_is_named_when_it_is_refused(tmp_path):
    path = tmp_path / "pocket-like.safetensors"
    pocket = backbones()["pocket"]["params"]["unet"]["params"]
    first = (pocket["model_channels"], pocket.get("in_channels", 4), 3, 3)
    shapes = {"input_blocks.0.0.weight": first, "input_blocks.3.1.x.attn2.to_k.weight": (9, pocket["context_dim"])}
    names = [VAE + "quant_conv.weight", TEXT + "transformer.text_model.final_layer_norm.weight"]
    tensors = {UNET + name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors | {name: torch.zeros(1) for name in names}, path)
    with torch.device("meta"):
        unet = UNet(num_heads=8, context_dim=768)
    with pytest.raises(ValueError) as error:
        load_into({UNET: unet}, path)
    message = str(error.value)
    assert message.startswith(f"{path}: 685 of 686 expected tensors are missing: {UNET}time_embed.0.weight, ")
    assert message.endswith(", …; it looks like pocket; use configs/backbone/pocket.yaml")
