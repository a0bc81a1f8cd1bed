"""Small models in the layouts of SD 1.5, SD 2.1 and SDXL, as ours and as a pipeline of diffusers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from infusion.concepts import places
from infusion.sampling.sample import sample
from ldm.diffusion.sampler import initial_noise
from ldm.pipeline import StableDiffusion
from ldm.util.config import instantiate
from ldm.weights.export import export_diffusers

WIDTH = {"tiny": 32, "tiny2": 48, "tinyxl": 80}  # of the text: layouts of SD 1.5, SD 2.1 and SDXL
SINGLE = ("tiny", "tiny2")  # which have one text encoder
PROMPT, NEGATIVE, STEPS, SCALE, SEED = "a photo of a sks dog on a hill", "blurry cat", 2, 4.0, 3


def text_node(kind: str, width: int, **more: Any) -> dict[str, Any]:
    tokenizer = {"target": "ldm.models.tokenizer.Tokenizer", "params": {"pad": "end" if kind == "Clip" else "zero"}}
    size = {"hidden_size": width, "heads": 2, "tokenizer": tokenizer} | more
    size |= {"intermediate_size": 64} if kind == "Clip" else {}
    return {"target": f"ldm.models.text.{kind}Text", "params": size}


def node(name: str) -> dict[str, Any]:
    unet = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "context_dim": WIDTH[name]}
    wide = {"num_head_channels": 16, "use_linear": True}
    if name == "tinyxl":
        unet |= wide | {"attention_resolutions": [2], "transformer_depth": [0, 2], "pooled_dim": 48, "pixels": 2}
        first, second = text_node("Clip", 32, layers=3, skip=1), text_node("OpenClip", 48, layers=3, pools=True)
        text = {"target": "ldm.models.text.TextPair", "params": {"first": first, "second": second}}
    elif name == "tiny2":
        unet |= wide | {"attention_resolutions": [1, 2]}
        text = text_node("OpenClip", 48, layers=3)
    else:
        unet |= {"num_heads": 2, "attention_resolutions": [1, 2]}
        text = text_node("Clip", 32, layers=2)
    parts = {
        "unet": {"target": "ldm.models.unet.UNet", "params": unet},
        "vae": {"target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}},
        "text": text,
        "schedule": {"target": "ldm.diffusion.schedule.Schedule", "params": {}},
    }  # fmt: skip
    return {"target": "ldm.pipeline.StableDiffusion", "params": {"name": name, "image_size": 16, **parts}}


NODES = {name: node(name) for name in WIDTH}


def randomised(module: nn.Module) -> nn.Module:
    """Every number counts, and words differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=1.0 if "token_embedding" in name else 0.03)
    return module.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def models() -> dict[str, StableDiffusion]:
    return {name: randomised(instantiate(own, "sd")) for name, own in NODES.items()}


@pytest.fixture(scope="session")
def exported(models, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for name, sd in models.items():
        export_diffusers(sd, folder / name)
    return {name: folder / name for name in models}


@pytest.fixture
def known(monkeypatch) -> Iterator[None]:
    """The small models, as if their configs were in configs/backbone."""
    monkeypatch.setattr("ldm.weights.recognise.backbones", lambda: NODES)
    places.skeleton.cache_clear()
    yield
    places.skeleton.cache_clear()


@pytest.fixture
def ours(models) -> Callable[..., Tensor]:
    def draw(name: str, concepts: list, prompt: str = PROMPT, **settings: Any) -> Tensor:
        how = dict(steps=STEPS, scale=SCALE, negative_prompt=NEGATIVE, seed=SEED) | settings
        return sample(models[name], [prompt], concepts, **how)

    return draw


@pytest.fixture
def pipeline(exported) -> Callable[[str], DiffusionPipeline]:
    def load(name: str) -> DiffusionPipeline:
        pipe = DiffusionPipeline.from_pretrained(exported[name], local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture
def theirs(models) -> Callable[..., Tensor]:
    def draw(pipe: DiffusionPipeline, name: str, prompt: str = PROMPT, **more: Any) -> Tensor:
        noise = initial_noise([torch.Generator().manual_seed(SEED)], models[name].latent_shape())
        how = dict(num_inference_steps=STEPS, guidance_scale=SCALE, height=16, width=16, output_type="pt")
        return pipe(prompt, negative_prompt=NEGATIVE, latents=noise, **how, **more).images

    return draw


@pytest.fixture
def agree(models, ours) -> Callable[..., None]:
    """Two images are one, and not the base model's."""

    def check(name: str, actual: Tensor, reference: Tensor, prompt: str = PROMPT) -> None:
        base = ours(name, [], prompt.replace("{}", "dog"))
        assert (actual - reference).abs().max() <= 2e-4
        assert (reference - base).abs().max() > 4e-3

    return check
