"""diffusers' names for this project's tensors, both ways, with diffusers and transformers as the judges."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL as TheirVae
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.models.text import OpenClipText
from ldm.pipeline import StableDiffusion
from ldm.weights.checkpoint import load_into, sha256
from ldm.weights.diffusers_layout import Folder, diffusers_names, unrun
from ldm.weights.export import export_diffusers, text_config, unet_config, vae_config

ROOT = Path(__file__).parents[3]
SMALL_SD2 = """
sd:
  target: ldm.pipeline.StableDiffusion
  params:
    name: small2
    image_size: 32
    unet:
      target: ldm.models.unet.UNet
      params: {model_channels: 32, channel_mult: [1, 2, 2], num_res_blocks: 2, attention_resolutions: [2, 4],
               num_head_channels: 16, context_dim: 24, use_linear: true, upcast_attention: true, transformer_depth: 2}
    vae:
      target: ldm.models.autoencoder.AutoencoderKL
      params: {ch: 32, ch_mult: [1, 2, 4], num_res_blocks: 1}
    text:
      target: ldm.models.text.OpenClipText
      params:
        tokenizer: {target: ldm.models.tokenizer.Tokenizer, params: {context_length: 12, merges: 300, pad: zero}}
        hidden_size: 24
        layers: 3
        heads: 2
        max_length: 12
    schedule: {target: ldm.diffusion.schedule.Schedule, params: {prediction_type: v_prediction}}
"""


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def theirs(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes under diffusers' names, by the mapping; every name may come once."""
    found: dict[str, tuple[int, ...]] = {}
    for name, targets in diffusers_names(module).items():
        rows, *rest = module.state_dict()[name].shape or (1,)
        for target in targets:
            assert target not in found
            found[target] = (rows // len(targets), *rest)
    return found


@pytest.mark.parametrize("name", ["sd15", "sd21", "sd21_768", "pocket"])
def test_every_tensor_of_the_published_sizes_is_hit_once(name):
    with torch.device("meta"):
        sd = StableDiffusion.from_config(ROOT / f"configs/backbone/{name}.yaml")
        unet = UNet2DConditionModel.from_config(unet_config(sd.unet, 64))
        vae = TheirVae.from_config(vae_config(sd.vae, 512))
        text = CLIPTextModel(CLIPTextConfig(**text_config(sd.text)))
    assert theirs(sd.unet) == shapes(unet)
    assert {n: s[:2] if "attentions" in n else s for n, s in theirs(sd.vae).items()} == shapes(vae)
    assert theirs(sd.text) == {n.removeprefix("text_model."): s for n, s in shapes(text).items()}
    expected = {"sd15": (8, False), "sd21": ([5, 10, 20, 20], False), "sd21_768": ([5, 10, 20, 20], True)}
    if name in expected:  # the published configs
        heads, upcast = expected[name]
        config = unet_config(sd.unet, 64)
        assert config["attention_head_dim"] == ([heads] * 4 if heads == 8 else heads)
        assert config["block_out_channels"] == [320, 640, 1280, 1280] and config["upcast_attention"] is upcast
        assert text_config(sd.text)["num_hidden_layers"] == (12 if name == "sd15" else 23)
        assert text_config(sd.text)["hidden_act"] == ("quick_gelu" if name == "sd15" else "gelu")


@pytest.mark.slow
def test_every_tensor_of_sdxl_is_hit_once():
    with torch.device("meta"):
        sd = StableDiffusion.from_config(ROOT / "configs/backbone/sdxl.yaml")
        config = unet_config(sd.unet, 128)
        unet = UNet2DConditionModel.from_config(config)
        texts = [
            cls(CLIPTextConfig(**text_config(text)))
            for cls, text in zip((CLIPTextModel, CLIPTextModelWithProjection), sd.text.embedders, strict=True)
        ]
    assert theirs(sd.unet) == shapes(unet)
    for text, model in zip(sd.text.embedders, texts, strict=True):
        assert theirs(text) == {name.removeprefix("text_model."): shape for name, shape in shapes(model).items()}
    published = {
        "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time", "use_linear_projection": True,
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    assert {name: config[name] for name in published} == published


def random_model(config: Path) -> StableDiffusion:
    torch.manual_seed(0)
    sd = StableDiffusion.from_config(config)
    with torch.no_grad():
        for parameter in sd.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return sd


@pytest.fixture(scope="module", params=["clip", "openclip"])
def exported(request, tiny, tmp_path_factory) -> tuple[StableDiffusion, Path, Path]:
    """A model of each family, its config, and its diffusers folder."""
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny
    if request.param == "openclip":
        config = folder / "small2.yaml"
        config.write_text(SMALL_SD2)
    sd = random_model(config)
    export_diffusers(sd, folder / "diffusers")
    return sd, config, folder / "diffusers"


def used(sd: StableDiffusion) -> dict[str, torch.Tensor]:
    unused = unrun(sd.text)
    return {name: t for name, t in sd.state_dict().items() if name.removeprefix("text.") not in unused}


def same(a: StableDiffusion, b: StableDiffusion) -> bool:
    ours, theirs = used(a), used(b)
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())


@torch.no_grad()
def test_their_models_compute_the_same(exported):
    sd, _, folder = exported
    unet, info = UNet2DConditionModel.from_pretrained(folder / "unet", output_loading_info=True)
    vae, more = TheirVae.from_pretrained(folder / "vae", output_loading_info=True)
    text, most = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not any(found[key] for found in (info, more, most) for key in ("missing_keys", "unexpected_keys"))
    tokens = sd.text.tokenizer(["a photo of a cat", "two dogs"])
    context = sd.text.encode_tokens(tokens)
    torch.testing.assert_close(text(tokens).last_hidden_state, context, atol=1e-5, rtol=1e-5)
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    expected = sd.unet(latents, timesteps, context)
    assert expected.std() > 0.1
    torch.testing.assert_close(unet(latents, timesteps, context).sample, expected, atol=1e-4, rtol=1e-4)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    scaled = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(scaled, sd.vae.encode(images), atol=1e-4, rtol=1e-4)
    decoded = vae.decode(scaled / vae.config.scaling_factor).sample
    torch.testing.assert_close(decoded, sd.vae.decode(scaled), atol=1e-4, rtol=1e-4)


def test_their_tokenizer_gives_the_same_ids(exported):
    sd, _, folder = exported
    tokenizer, prompts = CLIPTokenizer.from_pretrained(folder / "tokenizer"), ["a photo of a cat", "Two  striped dogs!"]
    length = sd.text.tokenizer.context_length
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, sd.text.tokenizer(prompts))


def test_a_folder_loads_as_it_was_written(exported):
    sd, config, folder = exported
    back = StableDiffusion.from_checkpoint(config, folder)
    assert same(sd, back) and back.weights == folder and back.hash == sha256(folder)
    assert not any(t.is_meta for t in [*back.parameters(), *back.buffers()])
    with pytest.raises(ValueError, match="exists already"):
        export_diffusers(sd, folder)


def rewritten(folder: Path, part: str, change) -> None:
    """The part's tensors under other names; as a pickle when `change` is None."""
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    if change is None:
        stem = "pytorch_model" if part == "text_encoder" else path.stem
        torch.save(tensors, folder / part / f"{stem}.bin")
    else:
        changed = dict(change(name, tensor) for name, tensor in tensors.items())
        save_file(changed, folder / part / f"{path.stem}.fp16.safetensors")


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_vae(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    for new, old in OLD.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name, tensor


def test_files_of_every_age_load_alike(exported, tmp_path):
    sd, config, source = exported
    clip = {"text_encoder": lambda name, t: (name.removeprefix("text_model."), t)}
    half = {"unet": lambda name, t: (name, t.half())}
    for i, changes in enumerate(
        [{"vae": old_vae}, clip, {part: None for part in ("unet", "vae", "text_encoder")}, half]
    ):
        folder = tmp_path / str(i)
        export_diffusers(sd, folder)
        for part, change in changes.items():
            before = set(Folder(folder).shapes)
            rewritten(folder, part, change)
            assert set(Folder(folder).shapes) == before
        back = StableDiffusion.from_checkpoint(config, folder)
        if changes is half:
            assert torch.equal(back.unet.out[2].weight, sd.unet.out[2].weight.half().float())
        else:
            assert same(sd, back)


def test_position_ids_of_old_files_are_no_surprise(exported, tmp_path, recwarn):
    sd, config, _ = exported
    export_diffusers(sd, tmp_path / "a")
    path = tmp_path / "a/text_encoder/model.safetensors"
    save_file({**load_file(path), "text_model.embeddings.position_ids": torch.arange(5)[None]}, path)
    assert same(sd, StableDiffusion.from_checkpoint(config, tmp_path / "a"))
    assert not [w for w in recwarn if "no place" in str(w.message)]


def test_one_part_alone_loads_into_its_module(exported):
    sd, config, folder = exported
    other = random_model(config)
    for component, file in (("unet", "unet/diffusion_pytorch_model"), ("vae", "vae/diffusion_pytorch_model"),
                            ("text", "text_encoder/model")):  # fmt: skip
        module = getattr(other, component)
        for parameter in module.parameters():
            nn.init.ones_(parameter)
        assert load_into({"": module}, folder / f"{file}.safetensors") == []
    assert same(sd, other)


def test_damaged_folders_are_refused(exported, tmp_path):
    sd, config, _ = exported
    with pytest.raises(ValueError, match="no diffusers folder"):
        StableDiffusion.from_checkpoint(config, tmp_path)
    folder = tmp_path / "a"
    export_diffusers(sd, folder)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if name != "conv_in.bias"}, path)
    with pytest.raises(ValueError, match="1 of .* expected tensors are missing: unet/conv_in.bias; it looks like"):
        StableDiffusion.from_checkpoint(config, folder)
    save_file({**tensors, "add_embedding.weight": torch.zeros(1)}, path)
    with pytest.warns(UserWarning, match="1 tensors have no place in .*: unet/add_embedding.weight"):
        StableDiffusion.from_checkpoint(config, folder)


def test_the_prediction_type_must_agree(exported, tmp_path):
    """The tensors of both are the same, so that nothing else could tell."""
    sd, config, _ = exported
    export_diffusers(sd, tmp_path / "a")
    path = tmp_path / "a/scheduler/scheduler_config.json"
    settings = json.loads(path.read_text())
    assert settings["prediction_type"] == sd.schedule.prediction_type
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[sd.schedule.prediction_type]
    path.write_text(json.dumps(settings | {"prediction_type": other}))
    with pytest.raises(ValueError, match=f"its UNet predicts {other}, .* predicts {sd.schedule.prediction_type}"):
        StableDiffusion.from_checkpoint(config, tmp_path / "a")
    path.unlink()
    assert same(sd, StableDiffusion.from_checkpoint(config, tmp_path / "a"))


def test_what_diffusers_cannot_express_is_refused(tiny, tmp_path):
    sd = random_model(tiny)
    sd.vae.encoder.norm_out.num_groups = 16
    with pytest.raises(ValueError, match="different GroupNorms .of 16, 32 groups"):
        export_diffusers(sd, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_openclip_merges_queries_keys_and_values(tokenizer_of_nine):
    text = OpenClipText(tokenizer_of_nine, 8, layers=2, heads=2, max_length=9)
    names = diffusers_names(text)
    rows = [f"encoder.layers.0.self_attn.{which}_proj.weight" for which in "qkv"]
    assert names["model.transformer.resblocks.0.attn.in_proj_weight"] == tuple(rows)
    assert not unrun(text) & names.keys() and len(unrun(text) | names.keys()) == len(text.state_dict())


@pytest.fixture
def tokenizer_of_nine():
    from ldm.models.tokenizer import Tokenizer

    return Tokenizer(merges=0, context_length=9, pad="zero")
