from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ldm.models.unet import UNet
from ldm.weights.checkpoint import load_into
from ldm.weights.files import TensorFile
from ldm.weights.names import PREFIXES
from ldm.weights.recognise import CONCEPT, backbones, recognise

MANIFESTS = Path(__file__).parents[1] / "manifests"
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


def test_relatives_of_the_published_checkpoints_are_told_apart():
    inpainting = published(1) | {UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)}
    assert "an inpainting model: 9 input channels" in recognise(file(inpainting)).says
    refiner = published(1) | {"conditioner.embedders.0.model.ln_final.weight": (1280,)}
    assert recognise(file(refiner)).says.startswith("SDXL")
    other = published(1) | {UNET + "input_blocks.0.0.weight": (256, 4, 3, 3)}
    assert "that no backbone here fits: 4 input channels, width 256, text of width 768" in recognise(file(other)).says


@pytest.mark.parametrize(
    "shapes, name, says",
    [
        ({UNET + name: shape for name, shape in WIDTHS.items()}, "unet", "a UNet alone"),
        ({"down_blocks.0.resnets.0.conv1.weight": (8,), "conv_in.weight": (8,)}, "diffusers unet",
         "a diffusers UNet file alone"),
        ({"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048)}, "other", "SDXL"),
        ({"lora_unet_mid_block.lora_up.weight": (8, 4)}, "lora", "a LoRA"),
        ({"unet.down_blocks.0.to_k.lora_A.weight": (4, 8)}, "lora", "a LoRA"),
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
