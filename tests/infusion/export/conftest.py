"""Tiny pipelines of diffusers with random weights: SD 1.5's and 2.1's layout beside our own model, and SDXL's."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from infusion.concepts.concept import Concept
from infusion.export.diffusers import unload
from infusion.export.rows import layer_names
from infusion.inject import cross_attention_layers
from ldm.diffusion.schedule import Schedule
from ldm.models.autoencoder import AutoencoderKL as OurAutoencoder
from ldm.models.text import ClipText, OpenClipText
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNet
from ldm.pipeline import StableDiffusion
from ldm.weights.export import export_diffusers

WORDS = 2000  # merges of the tokenizer, which has some words whole
END = 512 + WORDS + 1  # its end token
TEMPLATES = ("a photo of a {}", "the {}", "{}")


def lively(module: nn.Module) -> nn.Module:
    """Fills in what is zero at the start, so that every layer matters, and tells words apart."""
    for name, parameter in module.named_parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith("token_embedding.weight"):
            parameter.data.mul_(50)
    return module.requires_grad_(False).eval()


def tiny(layout: str, words: int | None = WORDS) -> StableDiffusion:
    torch.manual_seed(0)
    common = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2),
                  context_dim=32)  # fmt: skip
    if layout == "sd15":
        unet = UNet(num_heads=2, **common)
        text = ClipText(Tokenizer(words), hidden_size=32, intermediate_size=64, layers=2, heads=2)
    else:
        unet = UNet(num_head_channels=16, use_linear=True, **common)
        text = OpenClipText(Tokenizer(words, pad="zero"), hidden_size=32, layers=3, heads=2)
    vae = OurAutoencoder(ch=32, ch_mult=(1, 2), num_res_blocks=1)
    return lively(StableDiffusion(unet, vae, text, Schedule(), name="tiny", image_size=16))


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Callable[[str], tuple[StableDiffusion, Path]]:
    """Our model of a layout, and a diffusers folder of it."""
    made = {}

    def model(layout: str) -> tuple[StableDiffusion, Path]:
        if layout not in made:
            sd, folder = tiny(layout), tmp_path_factory.mktemp("diffusers") / layout
            export_diffusers(sd, folder)
            made[layout] = sd, folder
        return made[layout]

    return model


@pytest.fixture
def new_pipeline(models) -> Callable[..., StableDiffusionPipeline]:
    def load(layout: str, dtype: torch.dtype = torch.float32):
        folder = models("sd15" if layout == "sdxl" else layout)[1]
        if layout == "sdxl":
            pipe = tiny_sdxl(folder)
        else:
            pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture(scope="session")
def made() -> dict[str, StableDiffusionPipeline]:
    return {}


@pytest.fixture
def pipeline(new_pipeline, made) -> Iterator[Callable[[str], StableDiffusionPipeline]]:
    """One pipeline of each layout for all tests, which leave it as it was."""

    def get(layout: str) -> StableDiffusionPipeline:
        if layout not in made:
            made[layout] = new_pipeline(layout)
        return made[layout]

    yield get
    for pipe in made.values():
        if pipe.unet._forward_pre_hooks:
            unload(pipe)


def tiny_sdxl(folder: Path) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
    )  # fmt: skip
    shape = dict(hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3, projection_dim=32,
                 bos_token_id=END - 1, eos_token_id=END, vocab_size=END + 1)  # fmt: skip
    texts = [
        CLIPTextModel(CLIPTextConfig(**shape)),
        CLIPTextModelWithProjection(CLIPTextConfig(**shape, hidden_act="gelu")),
    ]
    for module in (unet, *texts):
        lively(module)
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=texts[0], text_encoder_2=texts[1],
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet, scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"), add_watermarker=False,
    )  # fmt: skip


@pytest.fixture
def concept() -> Callable[..., Concept]:
    """A random concept for our UNet or for diffusers'; the same for both where they are the same."""

    def make(unet: nn.Module, noun: str = "cat", seed: int = 1, **fields) -> Concept:
        if isinstance(unet, UNet2DConditionModel):
            widths = {ours: unet.get_submodule(name).inner_dim for ours, name in layer_names(unet).items()}
        else:
            widths = {name: layer.heads * layer.dim_head for name, layer in cross_attention_layers(unet).items()}
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: 5 * torch.randn(width, generator=generator) for name, width in widths.items()}
        return Concept(tensors, noun, TEMPLATES, **{"architecture": "tiny"} | fields)

    return make
