"""What turns images into features: the pocket CLIP, or a CLIP, DINO or ViT from a local folder; nothing is downloaded.

CLIP-I, CLIP-T and drift take a CLIP, DINO takes `facebook/dino-vits16` (the ViT-S/16 of DreamBooth), DINOv2 one such as
`facebook/dinov2-small`. A figure means nothing without the backbone's name beside it.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
# model_type of a folder's config.json -> class, and its own arguments
CLASS_TOKEN: dict[str, tuple[type[PreTrainedModel], dict[str, bool]]] = {
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
    kind = _model_type(folder)
    if kind == "clip":
        return ClipBackbone(folder, device)
    if kind in CLASS_TOKEN:
        return ClassTokenBackbone(folder, kind, device)
    raise UserError(f"backbone {spec}: is of a {kind}, not of a clip, {', '.join(CLASS_TOKEN)}")


def load_pocket_clip(config: str | Path = POCKET_CONFIG, weights: str | Path = POCKET_WEIGHTS) -> Clip:
    """The pocket world's CLIP, frozen; raises ValueError for a missing file or one of another model."""
    nodes = resolve(load_config(find(config)))
    if "clip" not in nodes:
        raise ConfigError(f"{config}: the config has no node `clip`")
    clip = instantiate(nodes.clip, "clip")
    load_into({"": clip}, find(weights))
    return clip.requires_grad_(False).eval()


def pooled_latents(latents: Tensor, side: int = 4) -> Tensor:
    """Latents (B, C, h, w) averaged over a grid of side × side: (B, C · side²) float32, not of unit length.

    Raises:
        ValueError: latents smaller than the grid.
    """
    if latents.dim() != 4 or min(latents.shape[2:]) < side or side < 1:
        raise ValueError(f"latents {tuple(latents.shape)} cannot be pooled to {side} × {side}")
    return F.adaptive_avg_pool2d(latents.float(), side).flatten(1)


def crop_to(images: Tensor, masks: Tensor, margin: float = 0.1) -> Tensor:
    """The subject of each image: the smallest square around its mask, resized to the image's size.

    Args:
        images: (B, 3, S, S).
        masks: (B, s, s) at least 0; what exceeds half of a mask's maximum is the subject.
        margin: on each side, as a share of the longer side of the mask's bounding box.

    Returns:
        (B, 3, S, S). A square that would leave the image is moved into it, and is never larger than it.
    """
    size, crops = images.shape[-1], []
    for image, mask in zip(images, masks.to(images.device), strict=True):
        places = mask > mask.max() / 2
        spans = [places.any(axis).nonzero()[[0, -1]].flatten() for axis in (1, 0)]  # first and last row, column
        pixels = size / mask.shape[-1]
        side = min(max((last - first + 1).item() for first, last in spans) * pixels * (1 + 2 * margin), size)
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
    """A network of transformers and its folder's own preprocessing, which takes images as 8-bit pixels."""

    def __init__(self, folder: Path, network: PreTrainedModel) -> None:
        self.name = folder.resolve().name
        self.network = network
        self.processor = _processor(folder)

    def pixels(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> what the network takes, (B, 3, s, s), on its device."""
        images = images.mul(255).round().clamp(0, 255).byte()
        return self.processor(images=list(images.cpu()), return_tensors="pt").pixel_values.to(self.network.device)


class ClipBackbone(FolderBackbone):
    """CLIP's image tower and text tower."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        super().__init__(folder, _network(CLIPModel, folder).to(device))
        self.width = self.network.config.projection_dim
        self.tokenizer = _tokenizer(folder)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return F.normalize(self.network.get_image_features(self.pixels(images)).pooler_output, dim=-1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """As `TextBackbone.texts`; raises ValueError where the folder has no tokenizer."""
        if self.tokenizer is None:
            raise UserError(f"backbone {self.name}: its folder has no tokenizer files, so no features of texts")
        longest = self.network.config.text_config.max_position_embeddings
        if cut := [text for text in texts if len(self.tokenizer(text).input_ids) > longest]:
            many = f"{self.name} reads {longest} tokens, and no more of {len(cut)} longer prompts"
            warnings.warn(f"{many}, the first: {short(cut[0])}", stacklevel=2)
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return F.normalize(self.network.get_text_features(**tokens.to(self.network.device)).pooler_output, dim=-1)


class ClassTokenBackbone(FolderBackbone):
    """The class token of a vision transformer, after its last norm."""

    def __init__(self, folder: Path, kind: str, device: torch.device | str = "cpu") -> None:
        cls, arguments = CLASS_TOKEN[kind]
        super().__init__(folder, _network(cls, folder, arguments).to(device))
        self.width = self.network.config.hidden_size

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return F.normalize(self.network(self.pixels(images)).last_hidden_state[:, 0], dim=-1)


def _model_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"backbone {folder}: its config.json is not a mapping in JSON") from error


def _network(cls: type[PreTrainedModel], folder: Path, arguments: dict[str, bool] | None = None) -> nn.Module:
    """A network with every one of its weights from the folder, in float32."""
    try:
        network, found = cls.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32, **(arguments or {})
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


def _tokenizer(folder: Path) -> CLIPTokenizer | None:
    names: Sequence[tuple[str, ...]] = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    if not any(all((folder / name).is_file() for name in files) for files in names):
        return None
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
