"""What turns images into features: the pocket CLIP, or a CLIP, DINO or ViT from a local folder; nothing is downloaded.

CLIP-I, CLIP-T and drift take a CLIP, DINO takes `facebook/dino-vits16` (the ViT-S/16 of DreamBooth), DINOv2 one such as
`facebook/dinov2-small`. A figure means nothing without the backbone's name beside it.
"""

import json
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    ViTModel,
)

from ldm.models.clip import Clip
from ldm.util.cli import UserError
from ldm.util.config import ConfigError, find, instantiate, load_config, resolve
from ldm.util.defaults import POCKET
from ldm.util.defaults import POCKET_CLIP as POCKET_WEIGHTS
from ldm.util.templates import fill, short
from ldm.weights.checkpoint import load_into

POCKET_CONFIG = Path("configs/pocket_clip.yaml")
CLIP, MARGIN = "clip", 0.1  # `crop_to`'s, on each side: a share of the longer side of a mask's bounding box
# model_type of a folder's config.json -> class, and its own arguments
NETWORKS: dict[str, tuple[type[PreTrainedModel], dict[str, bool]]] = {
    CLIP: (CLIPModel, {}),
    "vit": (ViTModel, {"add_pooling_layer": False}),  # DINO is one
    "dinov2": (Dinov2Model, {}),
    "dinov2_with_registers": (Dinov2WithRegistersModel, {}),
}


@runtime_checkable
class Backbone(Protocol):
    """Features of images. Attributes: `name`, for reports; `width`, D."""

    name: str
    width: int

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> unit-length features (B, D), float32."""
        ...


@runtime_checkable
class TextBackbone(Backbone, Protocol):
    """Features of images and of texts in one space."""

    def texts(self, texts: list[str]) -> Tensor:
        """B texts -> unit-length features (B, D), float32."""
        ...


@runtime_checkable
class NounReader(Protocol):
    """Sees whether a picture shows what a noun names. Attributes: `name`, for reports; `nouns`, those that it knows."""

    name: str
    nouns: Sequence[str]

    def sees(self, images: Tensor, noun: str) -> list[bool]:
        """For each of the images (B, 3, H, W) in [0, 1]."""
        ...


class ZeroShot:
    """A CLIP as a classifier (Radford et al. 2021, section 3.1): the noun whose "a photo of a …" is nearest.

    Args:
        clip: features of images and texts.
        nouns: among which it chooses.
    """

    def __init__(self, clip: TextBackbone, nouns: Sequence[str]) -> None:
        self.name, self.nouns, self.clip = f"{clip.name}, zero-shot", tuple(nouns), clip
        self.texts = clip.texts([fill("a photo of a {}", [noun]) for noun in self.nouns])  # (K, D)

    def sees(self, images: Tensor, noun: str) -> list[bool]:
        """As `NounReader.sees`; the noun is one of `nouns`."""
        found = (self.clip(images) @ self.texts.mT).argmax(1)
        return (found == self.nouns.index(noun)).tolist()


def load_backbone(spec: str | Path, device: torch.device | str = "cpu") -> Backbone:
    """A backbone, in evaluation mode.

    Args:
        spec: "pocket", or a local folder in Hugging Face's layout: `config.json` of a clip, vit or dinov2, weights,
            `preprocessor_config.json`, and for CLIP's texts the tokenizer's files.
        device: where it runs.

    Raises:
        ValueError: no such folder, one of something else, or one that lacks a part.
    """
    if str(spec) == POCKET:
        return PocketBackbone(load_pocket_clip().to(device))
    folder = Path(spec)
    if not (folder / "config.json").is_file():
        raise UserError(f'backbone {spec}: "{POCKET}", or a local folder with a config.json, is wanted')
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"backbone {folder}: its config.json is not a mapping in JSON") from error
    if kind not in NETWORKS:
        raise UserError(f"backbone {spec}: is of a {kind}, not of a {', '.join(NETWORKS)}")
    return (ClipBackbone if kind == CLIP else FolderBackbone)(folder, kind, device)


def load_pocket_clip(config: str | Path = POCKET_CONFIG, weights: str | Path = POCKET_WEIGHTS) -> Clip:
    """The pocket world's CLIP, frozen; raises ValueError for a missing file or one of another model."""
    nodes = resolve(load_config(find(config)))
    if "clip" not in nodes:
        raise ConfigError(f"{config}: the config has no node `clip`")
    clip = instantiate(nodes.clip, "clip")
    load_into({"": clip}, find(weights))
    return clip.requires_grad_(False).eval()


def pooled_latents(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) averaged over a grid of 4 × 4: (B, 16 C) float32, not of unit length."""
    return F.adaptive_avg_pool2d(latents.float(), 4).flatten(1)


def crop_to(images: Tensor, masks: Tensor) -> Tensor:
    """The subject of each image: a square around its mask, resized to the image's size.

    Args:
        images: (B, 3, S, S).
        masks: (B, s, s) at least 0; what exceeds half of a mask's maximum is the subject.

    Returns:
        (B, 3, S, S). Each square has a margin on each side (`MARGIN`). One that would leave the image is moved into it,
        and is never larger than it.
    """
    size, crops = images.shape[-1], []
    for image, mask in zip(images, masks.to(images.device), strict=True):
        places = mask > mask.max() / 2
        spans = [places.any(axis).nonzero()[[0, -1]].flatten() for axis in (1, 0)]  # first and last row, column
        pixels = size / mask.shape[-1]
        side = min(max((last - first + 1).item() for first, last in spans) * pixels * (1 + 2 * MARGIN), size)
        corner = [((first + last + 1).item() * pixels - side) / 2 for first, last in spans]
        top, left = (round(min(max(at, 0), size - side)) for at in corner)
        square = image[:, top : top + max(round(side), 1), left : left + max(round(side), 1)]
        crops.append(F.interpolate(square[None], (size, size), mode="bilinear", antialias=True))
    return torch.cat(crops).clamp(0, 1)


class PocketBackbone:
    """A pocket world's CLIP."""

    def __init__(self, clip: Clip, name: str = POCKET) -> None:
        self.name, self.width = name, clip.visual_projection.out_features
        self.clip = clip

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.clip.image_features(images.to(self.clip.logit_scale.device))

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        return self.clip.text_features(texts)


class FolderBackbone:
    """The class token of a vision transformer, after its last norm, with its folder's own preprocessing."""

    def __init__(self, folder: Path, kind: str, device: torch.device | str = "cpu") -> None:
        cls, arguments = NETWORKS[kind]
        self.folder, self.name = folder, folder.resolve().name
        self.network, self.processor = _network(cls, folder, arguments).to(device), _processor(folder)
        self.width = self.network.config.projection_dim if kind == CLIP else self.network.config.hidden_size

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = images.mul(255).round().clamp(0, 255).byte()  # as in a file
        pixels = self.processor(images=list(images.cpu()), return_tensors="pt").pixel_values
        return F.normalize(self.features(pixels.to(self.network.device)), dim=-1)

    def features(self, pixels: Tensor) -> Tensor:
        """What the network makes of its own input (B, 3, s, s): (B, D), of any length."""
        return self.network(pixels).last_hidden_state[:, 0]


class ClipBackbone(FolderBackbone):
    """CLIP's image tower and text tower."""

    def features(self, pixels: Tensor) -> Tensor:
        return self.network.get_image_features(pixels).pooler_output

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        there = {file.name for file in self.folder.iterdir()}
        if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= there:
            raise UserError(f"backbone {self.name}: its folder has no tokenizer files, so no features of texts")
        return CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """As `TextBackbone.texts`; raises UserError where the folder has no tokenizer."""
        longest = self.network.config.text_config.max_position_embeddings
        if cut := [text for text in texts if len(self.tokenizer(text).input_ids) > longest]:
            many = f"{self.name} reads {longest} tokens, and no more of {len(cut)} longer prompts"
            warnings.warn(f"{many}, the first: {short(cut[0])}", stacklevel=2)
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return F.normalize(self.network.get_text_features(**tokens.to(self.network.device)).pooler_output, dim=-1)


def _network(cls: type[PreTrainedModel], folder: Path, arguments: dict[str, bool]) -> PreTrainedModel:
    """A network with every one of its weights from the folder, in float32."""
    try:
        network, found = cls.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32, **arguments
        )
    except (OSError, RuntimeError) as error:  # no file of weights; or one of another shape
        raise UserError(f"backbone {folder}: {str(error).splitlines()[0]}") from error
    if missing := sorted(found["missing_keys"]):  # transformers fills them in at random, with a warning
        raise UserError(f"backbone {folder}: its weights lack {len(missing)} tensors, such as {missing[0]}")
    return network.requires_grad_(False).eval()


def _processor(folder: Path) -> BaseImageProcessor:
    try:
        return AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"backbone {folder}: has no preprocessor_config.json that can be used") from error
