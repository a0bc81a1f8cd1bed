from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.models.unet import UNet
from ldm.pipeline import StableDiffusion
from ldm.util.config import load_config
from ldm.weights.checkpoint import PREFIXES, save, sha256
from ldm.weights.names import ema_name

ROOT = Path(__file__).parents[2]
MANIFESTS = Path(__file__).parent / "manifests"
CONFIG = """
sd:
  target: ldm.pipeline.StableDiffusion
  params:
    name: tiny
    image_size: 16
    checkpoint: ${ckpt}
    unet:
      target: ldm.models.unet.UNet
      params: {model_channels: 32, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [2], num_heads: 4,
               context_dim: 24}
    vae:
      target: ldm.models.autoencoder.AutoencoderKL
      params: {ch: 8, ch_mult: [1, 2], num_res_blocks: 1, scale_factor: 0.5}
    text:
      target: ldm.models.text.ClipText
      params:
        tokenizer: {target: ldm.models.tokenizer.Tokenizer, params: {merges: 300, context_length: 12}}
        hidden_size: 24
        intermediate_size: 48
        layers: 2
        heads: 2
        max_length: 12
    schedule: {target: ldm.diffusion.schedule.Schedule}
ckpt: TINY
ckpt_source: https://example.org/tiny
"""
PROMPTS = ["a cat", "a dog", "a cat on a hill"]
FAST = {"steps": 3, "scale": 3.0}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and its weights, none of them zero."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.replace("TINY", str(folder / "tiny.safetensors")))
    torch.manual_seed(0)
    sd = StableDiffusion.from_config(path)
    with torch.no_grad():
        for parameter in [*sd.unet.parameters(), *sd.text.parameters()]:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save(folder / "tiny.safetensors", dict(sd.named_children()), sd.architecture, torch.float32)
    return path


@pytest.fixture(scope="module")
def sd(config: Path) -> StableDiffusion:
    return StableDiffusion.from_checkpoint(config)


def manifest(name: str, prefix: str) -> dict[str, str]:
    tensors = dict(line.split(" ") for line in (MANIFESTS / f"{name}.txt").read_text().splitlines())
    return {prefix + name: shape for name, shape in tensors.items() if name != "embeddings.position_ids"}


def shapes(sd: StableDiffusion) -> dict[str, str]:
    return {
        prefix + name: "[" + ",".join(map(str, t.shape)) + "]"
        for component, prefix in PREFIXES.items()
        for name, t in getattr(sd, component).state_dict().items()
    }


@pytest.mark.parametrize(
    "name, unet, text, level, size, kind, upcast",
    [
        ("sd15", "UNET-v1-SD", "CLIP-v1-SD", "transformer.text_model.", 512, "epsilon", False),
        ("sd21", "UNET-v2-SD", "CLIP-v2-SD", "model.", 512, "epsilon", False),
        ("sd21_768", "UNET-v2-SD", "CLIP-v2-SD", "model.", 768, "v_prediction", True),
    ],
)
def test_backbones_are_the_published_ones(name, unet, text, level, size, kind, upcast):
    with torch.device("meta"):
        sd = StableDiffusion.from_config(ROOT / f"configs/backbone/{name}.yaml")
    assert shapes(sd) == {
        **manifest(unet, PREFIXES["unet"]),
        **manifest("VAE-v1-SD", PREFIXES["vae"]),
        **manifest(text, PREFIXES["text"] + level),
    }
    assert (sd.architecture, sd.image_size, sd.schedule.prediction_type) == (name, size, kind)
    assert sd.latent_shape() == (4, size // 8, size // 8)
    assert sd.vae.scale_factor == 0.18215
    assert sd.text.tokenizer.pad == (49407 if name == "sd15" else 0)
    assert {m.upcast for n, m in sd.unet.named_modules() if n.endswith(("attn1", "attn2"))} == {upcast}
    assert sd.hash is None


def test_sdxl_is_the_published_one():
    with torch.device("meta"):
        sd = StableDiffusion.from_config(ROOT / "configs/backbone/sdxl.yaml")
    found = {n: "[" + ",".join(map(str, t.shape)) + "]" for n, t in sd.state_dict().items()}
    assert found == {
        **manifest("UNET-XL-SD", "unet."),
        **manifest("VAE-v1-SD", "vae."),
        **manifest("CLIP-v1-SD", "text.embedders.0.transformer.text_model."),
        **manifest("OPENCLIP-XL-SD", "text.embedders.1.model."),
    }
    assert (sd.architecture, sd.image_size, sd.schedule.prediction_type) == ("sdxl", 1024, "epsilon")
    assert sd.latent_shape(832, 1216) == (4, 104, 152) and sd.vae.scale_factor == 0.13025
    assert [text.tokenizer.pad for text in sd.text.embedders] == [49407, 0] and sd.text.width == 2048
    assert not any(buffer.is_meta for buffer in sd.text.buffers())


def test_parts_of_other_conditioning_are_refused(sd):
    with torch.device("meta"):
        xl = StableDiffusion.from_config(ROOT / "configs/backbone/pocket_xl.yaml")
    options = {"model_channels": 32, "channel_mult": (1, 2), "num_heads": 2, "context_dim": xl.text.width}
    with pytest.raises(ValueError, match="the UNet's pooled_dim is None, the text encoder's 24"):
        StableDiffusion(UNet(**options), xl.vae, xl.text, xl.schedule)
    with pytest.raises(ValueError, match="the UNet's pixels is 8, the autoencoder's factor 4"):
        StableDiffusion(UNet(pooled_dim=24, **options), xl.vae, xl.text, xl.schedule)


@pytest.mark.parametrize(("side", "at_once"), [(96, 4), (128, 1)])
def test_large_images_are_decoded_one_at_a_time(sd, monkeypatch, side, at_once):
    batches = []
    monkeypatch.setattr(sd.vae, "factor", 8)
    monkeypatch.setattr(sd.vae, "decode", lambda rows: batches.append(len(rows)) or rows[:, :3])
    assert sd.decode(torch.zeros(5, 4, side, side)).shape == (5, 3, side, side)
    assert batches == {4: [4, 1], 1: [1] * 5}[at_once]


def test_a_trained_model_is_frozen_and_complete(sd, config):
    file = config.with_suffix(".safetensors")
    assert sd.architecture == "tiny" and sd.hash == sha256(file) and sd.weights == file
    assert not sd.training and not any(p.requires_grad for p in sd.parameters())
    assert not any(t.is_meta for t in [*sd.parameters(), *sd.buffers()])
    again = StableDiffusion.from_config(config)
    assert again.hash is None
    again.load(file)
    assert again.hash == sd.hash
    assert all(torch.equal(a, b) for a, b in zip(sd.parameters(), again.parameters(), strict=True))


def test_the_hash_tells_every_source_of_weights_apart(sd, config, tmp_path):
    file = config.with_suffix(".safetensors")
    tensors = load_file(file)
    unet = {n.removeprefix(PREFIXES["unet"]): t + 1 for n, t in tensors.items() if n.startswith(PREFIXES["unet"])}
    averages = {ema_name(name): tensor for name, tensor in unet.items()}
    save_file(tensors | averages, tmp_path / "both.safetensors")
    save_file(unet, tmp_path / "unet.safetensors")
    vae = {n.removeprefix(PREFIXES["vae"]): t for n, t in tensors.items() if n.startswith(PREFIXES["vae"])}
    save_file(vae, tmp_path / "vae.safetensors")
    made = {
        name: StableDiffusion.from_checkpoint(config, tmp_path / "both.safetensors", **options)
        for name, options in {
            "plain": {},
            "averages": {"use_ema": True},
            "unet": {"parts": {"unet": tmp_path / "unet.safetensors"}},
            "vae": {"parts": {"vae": tmp_path / "vae.safetensors"}},
            "averages and vae": {"use_ema": True, "parts": {"vae": tmp_path / "vae.safetensors"}},
        }.items()
    }
    assert made["plain"].hash == sha256(tmp_path / "both.safetensors")
    assert len({one.hash for one in (*made.values(), sd)}) == 6
    assert [name for name, one in made.items() if one.use_ema] == ["averages", "averages and vae"]
    assert made["vae"].parts == {"vae": sha256(tmp_path / "vae.safetensors")} and made["averages"].parts == {}
    named = torch.equal(made["unet"].unet.out[2].weight, made["averages"].unet.out[2].weight)
    assert named and not torch.equal(made["unet"].unet.out[2].weight, made["plain"].unet.out[2].weight)
    whole = StableDiffusion.from_checkpoint(config, tmp_path / "both.safetensors", use_ema=True, parts={"unet": file})
    assert not whole.use_ema  # the averages are gone again


def test_parts_alone_are_a_model_and_some_of_them_have_no_hash(sd, config):
    file = config.with_suffix(".safetensors")
    lost = load_config(config, ["ckpt=lost.safetensors"])
    made = StableDiffusion.from_checkpoint(lost, parts=dict.fromkeys(PREFIXES, file))
    assert made.hash == sd.hash and made.weights is None  # the same weights, wherever they were named
    some = StableDiffusion.from_config(config)
    some.load_part("vae", file)
    assert some.hash is None and some.parts == {"vae": sha256(file)}
    with pytest.raises(ValueError, match="parts.vea: unknown component; did you mean `vae`"):
        some.load_part("vea", file)
    with pytest.raises(ValueError, match="parts: a mapping"):
        StableDiffusion.from_checkpoint(OmegaConf.merge(load_config(config), {"parts": "vae"}))


def test_images_are_in_range_and_repeat(sd):
    images = sd.sample(PROMPTS, **FAST)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.01
    assert torch.equal(images, sd.sample(PROMPTS, **FAST))
    assert (images - sd.sample(PROMPTS, seed=9, **FAST)).abs().amax((1, 2, 3)).min() > 0.01
    assert sd.sample(["a cat"], height=8, width=24, **FAST).shape == (1, 3, 8, 24)


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("plms", 0.0), ("euler_a", 0.0)])
def test_images_do_not_depend_on_the_batch_size(sd, sampler, eta):
    images = sd.sample(PROMPTS, sampler=sampler, eta=eta, seed=4, **FAST)
    for batch_size in (1, 2):
        other = sd.sample(PROMPTS, sampler=sampler, eta=eta, seed=4, batch_size=batch_size, **FAST)
        torch.testing.assert_close(other, images, atol=1e-5, rtol=0)
    alone = sd.sample(PROMPTS[2:], sampler=sampler, eta=eta, seed=6, **FAST)  # image 2 has the seed 4 + 2
    torch.testing.assert_close(alone, images[2:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("windows", [(1, 2, 1), (3, 2, 1), (3, 4, 5)])
def test_images_do_not_depend_on_the_length_of_other_prompts(sd, windows):
    inner = sd.text.tokenizer.context_length - 2
    prompts = ["red " * (inner * count - 2) + "cat" for count in windows]
    options = {"negative_prompt": "blurry " * (inner + 1), **FAST}
    images = sd.sample(prompts, seed=4, **options)
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(sd.sample([prompt], seed=4 + i, **options), images[i : i + 1], atol=1e-5, rtol=0)
    assert sd.text.context(sd.text.tokenizer.windows(prompts)).text.shape[1] == max(windows) * (inner + 2)


def test_sampling_is_guided_ddim_on_seeded_noise(sd):
    """The whole path once more, in plain torch."""
    text, negative = sd.text(["a cat"]), sd.text(["a dog"])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    alphas = sd.schedule.alphas_cumprod
    for t, before in ((667, 334), (334, 1), (1, 0)):
        prompt, away = (sd.unet(latents, torch.tensor([t]), c) for c in (text, negative))
        noise = away + 3 * (prompt - away)
        clean = (latents - (1 - alphas[t]).sqrt() * noise) / alphas[t].sqrt()
        alpha = alphas[before]
        latents = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    expected = ((sd.vae.decode(latents) + 1) / 2).clamp(0, 1)
    images = sd.sample(["a cat"], negative_prompt="a dog", seed=5, **FAST)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


def test_half_precision_leaves_the_autoencoder_alone(sd, config):
    half = StableDiffusion.from_checkpoint(config, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.device.type == "cpu"
    assert half.text(["a cat"]).dtype == torch.bfloat16  # fits the UNet without a cast
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    torch.testing.assert_close(half.sample(["a cat"], **FAST), sd.sample(["a cat"], **FAST), atol=0.1, rtol=0)


def test_autocast_does_not_reach_the_autoencoder(sd):
    latents = torch.randn(1, 4, 8, 8)
    expected = sd.decode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sd.decode(latents), expected)
        assert not torch.equal((sd.vae.decode(latents).float() / 2 + 0.5).clamp(0, 1), expected)


def test_any_denoiser_may_draw(sd):
    """A denoiser of one's own is made for each batch of prompts, and decides on the guidance itself."""
    batches, text = [], sd.text(["a cat"])

    def denoiser(prompts):
        batches.append(prompts)
        same = text.expand(len(prompts), -1, -1)
        return lambda latents, timestep: sd.unet(latents, timestep.expand(len(latents)), same)

    images = sd.sample(PROMPTS, denoiser, batch_size=2, **FAST)
    assert batches == [PROMPTS[:2], PROMPTS[2:]]
    expected = sd.sample(["a cat"] * 3, steps=FAST["steps"], scale=1)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_each_image_may_have_a_seed_of_its_own(sd):
    images = sd.sample(PROMPTS[:2], seed=[7, 3], **FAST)
    for i, seed in enumerate((7, 3)):
        alone = sd.sample(PROMPTS[i : i + 1], seed=seed, **FAST)
        torch.testing.assert_close(images[i : i + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": [1, 2]}, "one for each of 1 prompts, not 2"),
        ({"prompts": []}, "at least one string"),
        ({"prompts": "a cat"}, "must be a list"),
        ({"batch_size": 0}, "batch_size"),
        ({"height": 18}, "height must be a multiple of 4 pixels, such as 16 or 20, not 18"),
        ({"width": 0}, "width must be a multiple of 4 pixels, such as 4, not 0"),
        ({"sampler": "ddpm"}, "choose one of ddim"),
        ({"steps": 0}, "steps"),
    ],
)
def test_mistakes_are_refused(sd, options, message):
    with pytest.raises(ValueError, match=message):
        sd.sample(**{"prompts": ["a cat"], **FAST, **options})


def test_files_that_are_not_there(config, tmp_path):
    lost = tmp_path / "lost.yaml"
    lost.write_text(CONFIG.replace("TINY", "ckpt/lost.safetensors"))
    with pytest.raises(ValueError, match="ckpt/lost.safetensors: no such file; get it from https://example.org/tiny"):
        StableDiffusion.from_checkpoint(lost)
    with pytest.raises(ValueError, match="other.safetensors: no such file"):
        StableDiffusion.from_checkpoint(config, tmp_path / "other.safetensors")
    lost.write_text(CONFIG.replace("TINY", "null"))
    with pytest.raises(ValueError, match="'tiny' has no usual checkpoint file"):
        StableDiffusion.from_checkpoint(lost)
    lost.write_text("seed: 1")
    with pytest.raises(ValueError, match="sd: the config has no such node"):
        StableDiffusion.from_config(lost)


def test_a_file_with_more_in_it_warns(sd, tmp_path, config):
    larger = StableDiffusion.from_config(config)
    larger.unet.adapter = nn.Linear(2, 2)
    save(tmp_path / "larger.safetensors", dict(larger.named_children()), larger.architecture, torch.float32)
    with pytest.warns(UserWarning, match="2 tensors have no place in tiny: model.diffusion_model.adapter.bias"):
        StableDiffusion.from_checkpoint(config, tmp_path / "larger.safetensors")


def test_parts_must_fit(sd):
    text = SimpleNamespace(width=32)
    with pytest.raises(ValueError, match="width 24, the text encoder gives 32"):
        StableDiffusion(sd.unet, sd.vae, text, sd.schedule)
