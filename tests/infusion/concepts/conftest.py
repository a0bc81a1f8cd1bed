"""Small models in the layouts of SD 1.5 and SD 2.1, as ours and as a pipeline of diffusers, and files for them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from infusion.concepts import places
from infusion.sampling.sample import sample
from ldm.diffusion.sampler import initial_noise
from ldm.pipeline import StableDiffusion
from ldm.util.config import instantiate
from ldm.weights.export import export_diffusers

WIDTH = {"tiny": 32, "tiny2": 48}  # of the text: layouts of SD 1.5 and SD 2.1
PROMPT, NEGATIVE, STEPS, SCALE, SEED = "a photo of a sks dog on a hill", "blurry cat", 2, 4.0, 3


def node(name: str) -> dict[str, Any]:
    heads, text = (
        ({"num_heads": 2}, "Clip") if name == "tiny" else ({"num_head_channels": 16, "use_linear": True}, "OpenClip")
    )
    tokenizer = {"target": "ldm.models.tokenizer.Tokenizer", "params": {"pad": "end" if name == "tiny" else "zero"}}
    size = {"hidden_size": WIDTH[name], "layers": 2 if name == "tiny" else 3, "heads": 2, "tokenizer": tokenizer}
    unet = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [1, 2]}
    parts = {
        "unet": ("ldm.models.unet.UNet", unet | heads | {"context_dim": WIDTH[name]}),
        "vae": ("ldm.models.autoencoder.AutoencoderKL", {"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}),
        "text": (f"ldm.models.text.{text}Text", size | ({"intermediate_size": 64} if name == "tiny" else {})),
        "schedule": ("ldm.diffusion.schedule.Schedule", {}),
    }
    built = {part: {"target": target, "params": params} for part, (target, params) in parts.items()}
    return {"target": "ldm.pipeline.StableDiffusion", "params": {"name": name, "image_size": 16, **built}}


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
def pipeline(exported) -> Callable[[str], StableDiffusionPipeline]:
    def load(name: str) -> StableDiffusionPipeline:
        pipe = StableDiffusionPipeline.from_pretrained(exported[name], local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture
def theirs(models) -> Callable[..., Tensor]:
    def draw(pipe: StableDiffusionPipeline, name: str, prompt: str = PROMPT, **more: Any) -> Tensor:
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
