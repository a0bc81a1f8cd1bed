"""Judges samples of the pocket model: the world's classifier for what a prompt asked for, pocket CLIP for likeness."""

from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.pocket.classifier import SceneClassifier
from data.pocket.world import CHOICES, Scene
from ldm.checkpoint import load_into
from ldm.clip import Clip
from ldm.config import build, load_config

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "ckpt" / "pocket"


def load_classifier(path: str | Path = WEIGHTS / "classifier.safetensors") -> SceneClassifier:
    """The classifier, in evaluation mode. Raises ValueError when the file is missing or is another model's."""
    classifier = SceneClassifier()
    load_into({"": classifier}, path)
    return classifier.requires_grad_(False).eval()


def load_clip(path: str | Path = WEIGHTS / "clip.safetensors") -> Clip:
    """Pocket CLIP, frozen. Raises ValueError when the file is missing or is another model's."""
    config = load_config(ROOT / "configs" / "pocket_clip.yaml")
    clip = build(OmegaConf.to_container(config.clip, resolve=True), "clip")
    load_into({"": clip}, path)
    return clip.requires_grad_(False).eval()


def hits(classifier: SceneClassifier, images: Tensor, scenes: Sequence[Scene]) -> dict[str, list[bool]]:
    """For each part of a scene, whether the classifier reads off each image (B, 3, 64, 64) what the scene has."""
    found = classifier.read(images)
    return {
        name: [word == getattr(scene, name) for word, scene in zip(found[name], scenes, strict=True)]
        for name in CHOICES
    }


def likeness(clip: Clip, images: Tensor, photos: Tensor) -> Tensor:
    """CLIP-I: mean cosine of each image's features to those of the photos; (B, 3, H, W), (N, 3, H, W) -> (B,)."""
    return (clip.image_features(images) @ clip.image_features(photos).T).mean(1)


def likeness_among(clip: Clip, photos: Tensor) -> Tensor:
    """The ceiling of `likeness`: mean cosine of each photo to the others, (N,)."""
    features = clip.image_features(photos)
    similarity = features @ features.T
    return (similarity.sum(1) - similarity.diagonal()) / (len(photos) - 1)


def mean_and_error(values: Sequence[float] | Tensor) -> dict[str, float]:
    """Mean, standard error of the mean, and number of values."""
    values = torch.as_tensor(values, dtype=torch.float64)
    error = values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {"value": values.mean().item(), "stderr": error, "n": len(values)}
