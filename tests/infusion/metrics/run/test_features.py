import json

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from infusion.metrics.run.features import Backbone, TextBackbone, load_backbone, load_pocket_clip, pooled_latents

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = ["a photo of a cat", "an extraordinarily long caption " * 30, ""]


def pictures(count=3, height=40, width=52):
    """As PIL images, and as (B, 3, H, W) in [0, 1]."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels], torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "tiny-clip"
    torch.manual_seed(0)
    text = TOWER | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "max_position_embeddings": 20}
    vision = TOWER | {"image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.3, 0.4, 0.5]
    ).save_pretrained(folder)
    table = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in table.encoder.items()}
    CLIPTokenizer(vocab=vocabulary, merges=list(table.bpe_ranks)).save_pretrained(folder)
    return folder


def test_clip_is_transformers_pipeline(clip_folder):
    backbone = load_backbone(clip_folder)
    assert isinstance(backbone, TextBackbone) and (backbone.name, backbone.width) == ("tiny-clip", 12)
    opened, images = pictures()
    network = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(images=opened, return_tensors="pt")
    with torch.no_grad():
        wanted = F.normalize(network.get_image_features(**pixels).pooler_output, dim=-1)
    found = backbone(images)
    assert found.shape == (3, 12) and found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3  # the pictures differ
    torch.testing.assert_close(backbone(images[1:2]), found[1:2], atol=1e-5, rtol=0)
    assert torch.equal(backbone((images - 0.4 / 255).clamp(0)), found)  # as the same picture in a file

    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        TEXTS, padding="max_length", truncation=True, max_length=20, return_tensors="pt"
    )
    assert tokens.input_ids.max() == 49407 and tokens.input_ids[:, 0].eq(49406).all()
    with torch.no_grad():
        wanted = F.normalize(network.get_text_features(**tokens).pooler_output, dim=-1)
    torch.testing.assert_close(backbone.texts(TEXTS), wanted, atol=1e-5, rtol=0)


DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE = {"image_size": 32, "patch_size": 8}
CROP = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
FAMILIES = {
    "vit": (ViTModel, ViTConfig(**TOWER, **SIZE), ViTImageProcessor(size={"height": 32, "width": 32})),
    "dinov2": (Dinov2Model, Dinov2Config(**DINO, **SIZE), BitImageProcessor(**CROP)),
    "dinov2_with_registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(**DINO, **SIZE),
        BitImageProcessor(**CROP),
    ),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_class_token(kind, tmp_path):
    cls, config, processor = FAMILIES[kind]
    torch.manual_seed(0)
    network = cls(config).eval()
    network.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    backbone = load_backbone(str(tmp_path / "tiny"))
    assert isinstance(backbone, Backbone) and not isinstance(backbone, TextBackbone)
    assert (backbone.name, backbone.width) == ("tiny", 16)
    opened, images = pictures()
    with torch.no_grad():
        states = network(**processor(images=opened, return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(backbone(images), F.normalize(states[:, 0], dim=-1), atol=1e-5, rtol=0)


def test_a_classifier_lends_its_tower(tmp_path):
    torch.manual_seed(0)
    network = ViTForImageClassification(FAMILIES["vit"][1]).eval()
    network.save_pretrained(tmp_path)
    FAMILIES["vit"][2].save_pretrained(tmp_path)
    opened, images = pictures()
    with torch.no_grad():
        states = network.vit(**FAMILIES["vit"][2](images=opened, return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(load_backbone(tmp_path)(images), F.normalize(states[:, 0], dim=-1), atol=1e-5, rtol=0)


def test_pocket():
    backbone = load_backbone("pocket")
    assert isinstance(backbone, TextBackbone) and (backbone.name, backbone.width) == ("pocket", 128)
    images, clip = pictures(2, 64, 64)[1], load_pocket_clip()
    assert torch.equal(backbone(images), clip.image_features(images))
    assert torch.equal(backbone.texts(TEXTS[:1]), clip.text_features(TEXTS[:1]))
    for features in (backbone(images), backbone.texts(TEXTS)):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
        assert not features.requires_grad


def test_what_is_no_backbone_is_named(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="no-such.*local folder with a config.json"):
        load_backbone("openai/no-such-model")
    with pytest.raises(ValueError, match="local folder"):
        load_backbone(tmp_path)

    def config(text):
        (tmp_path / "config.json").write_text(text)

    config("{")
    with pytest.raises(ValueError, match="not a mapping in JSON"):
        load_backbone(tmp_path)
    config('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is of a bert, not of a clip"):
        load_backbone(tmp_path)
    whole = json.loads((clip_folder / "config.json").read_text())
    config(json.dumps(whole))
    with pytest.raises(ValueError, match="backbone ") as no_weights:
        load_backbone(tmp_path)
    assert "\n" not in str(no_weights.value) and "safetensors" in str(no_weights.value)

    tensors = load_file(clip_folder / "model.safetensors")
    name = "vision_model.post_layernorm.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lack 1 tensors, such as {name}"):  # not filled in at random
        load_backbone(tmp_path)
    save_file(tensors | {name: torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="backbone ") as misfit:
        load_backbone(tmp_path)
    assert "\n" not in str(misfit.value)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="no preprocessor_config.json"):
        load_backbone(tmp_path)
    CLIPImageProcessor.from_pretrained(clip_folder).save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    assert backbone(pictures()[1]).shape == (3, 12)
    with pytest.raises(ValueError, match="no tokenizer files"):
        backbone.texts(["a cat"])
    with pytest.raises(ValueError, match="no node `clip`"):
        (tmp_path / "other.yaml").write_text("other: {}\n")
        load_pocket_clip(tmp_path / "other.yaml")


def test_pooled_latents():
    latents = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    pooled = pooled_latents(latents)
    assert pooled.shape == (2, 48)
    assert pooled[1, 16].item() == latents[1, 1, :2, :2].mean().item()  # channel 1, first cell
    assert pooled[0, 7].item() == latents[0, 0, 2:4, 6:].mean().item()  # second row, last column
    assert pooled_latents(latents.half()).dtype == torch.float32
