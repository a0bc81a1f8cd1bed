"""Full-size models with random contents, and what the reference libraries make of the same file.

The peers read the file through diffusers' single-file loader, which derives their configs from LDM's own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.pipeline import StableDiffusion
from ldm.weights.checkpoint import PREFIXES, load_into
from tests.infusion.conftest import sd, tokenizer

__all__ = ["sd", "tokenizer"]

# what the published models say in LDM's configs, and what their text encoders say in transformers'
UNET = dict(in_channels=4, out_channels=4, model_channels=320, attention_resolutions=[4, 2, 1], num_res_blocks=2,
            channel_mult=[1, 2, 4, 4], transformer_depth=1)  # fmt: skip
VAE = dict(z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2)
CLIP = CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=12, num_attention_heads=12,
    hidden_act="quick_gelu",
)  # fmt: skip
OPEN_CLIP = CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, projection_dim=512, num_hidden_layers=23, num_attention_heads=16,
    hidden_act="gelu",
)  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """The reference libraries' reading of one architecture's file."""

    unet: dict[str, Any]
    text: CLIPTextConfig
    upcast: bool | None = None
    prediction_type: str = "epsilon"

    @property
    def config(self) -> dict[str, Any]:
        """LDM's config of the model."""
        parts = {"unet_config": {"params": UNET | self.unet}, "first_stage_config": {"params": {"ddconfig": VAE}}}
        return {"model": {"params": {"scale_factor": 0.18215, **parts}}}

    def load_unet(self, path: Path) -> UNet2DConditionModel:
        return UNet2DConditionModel.from_single_file(
            str(path), original_config=self.config, upcast_attention=self.upcast
        ).eval()

    def load_vae(self, path: Path) -> AutoencoderKL:
        return AutoencoderKL.from_single_file(str(path), original_config=self.config).eval()

    def load_text(self, path: Path, folder: Path) -> CLIPTextModel:
        """Writes the text encoder's config into `folder`, where the loader looks for it."""
        self.text.save_pretrained(folder)
        tensors = {name: t.float() for name, t in load_file(path).items() if name.startswith("cond_stage_model.")}
        return create_diffusers_clip_model_from_ldm(CLIPTextModel, tensors, config=str(folder), local_files_only=True)

    def scheduler(self) -> DDIMScheduler:
        """As the published pipelines configure it."""
        return DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, prediction_type=self.prediction_type,
        )  # fmt: skip


SD2 = dict(num_head_channels=64, use_linear_in_transformer=True, context_dim=1024)
PEERS = {
    "sd15": Peer(dict(num_heads=8, context_dim=768), CLIP),
    "sd21": Peer(SD2, OPEN_CLIP),
    "sd21_768": Peer(SD2, OPEN_CLIP, upcast=True, prediction_type="v_prediction"),
}


@pytest.fixture
def peer(architecture: str) -> Peer:
    return PEERS[architecture]


@pytest.fixture
def checkpoint(architecture: str, random_checkpoint) -> Path:
    return random_checkpoint(architecture.split("_")[0])  # SD 2.1 has the same tensors at both sizes


@pytest.fixture
def ours(architecture: str, configs: Path, checkpoint: Path):
    """Component of `StableDiffusion` -> that one, loaded."""

    def load(component: str) -> nn.Module:
        with torch.device("meta"):
            sd = StableDiffusion.from_config(configs / f"{architecture}.yaml")
        module = getattr(sd, component)
        load_into({PREFIXES[component]: module}, checkpoint)
        return module.requires_grad_(False)

    return load


@pytest.fixture
def agree():
    """Asserts that two tensors differ by at most 2e-4 of the reference's norm."""

    def check(actual: Tensor, reference: Tensor, tolerance: float = 2e-4) -> None:
        assert actual.shape == reference.shape and reference.isfinite().all()
        assert reference.std() > 1e-3  # nothing agrees by being zero
        difference = (actual.double() - reference.double()).norm() / reference.double().norm()
        print(f"relative difference {difference:.1e}")
        assert difference <= tolerance

    return check
