"""Reads a scene off an image: the judge of the pocket model's samples, never used in training a generator."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.pocket.world import CHOICES
from ldm.training.optimise import adamw


class SceneClassifier(nn.Module):
    """A small convolutional network with one head per part of a scene."""

    name, nouns = "pocket classifier", CHOICES["noun"]

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 128)):
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths[:-1]), widths, strict=True):
            layers += [nn.Conv2d(before, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
                       nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]  # fmt: skip
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1] * 16, len(words)) for name, words in CHOICES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, 64, 64) in [0, 1] -> logits (B, choices) for each part of a scene."""
        features = self.body(images * 2 - 1).flatten(1)  # (B, 16 W)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, list[str]]:
        """The likeliest word for each part, in evaluation mode."""
        self.eval()
        return {name: [CHOICES[name][i] for i in logits.argmax(1).tolist()] for name, logits in self(images).items()}

    def sees(self, images: Tensor, noun: str) -> list[bool]:
        """Whether each image (B, 3, 64, 64) in [0, 1] shows a noun."""
        return [word == noun for word in self.read(images)["noun"]]


class ClassifierTraining(pl.LightningModule):
    """Cross-entropy over every part of the scene. Images are blurred and perturbed at random, as a decoder does."""

    def __init__(self, classifier: SceneClassifier, learning_rate: float = 2e-3):
        super().__init__()
        self.classifier, self.learning_rate = classifier, learning_rate

    def training_step(self, batch: dict, index: int) -> Tensor:
        images = (batch["images"] + 1) / 2
        blur = torch.rand(len(images), 1, 1, 1, device=images.device)
        images = images + 0.8 * blur * (F.avg_pool2d(images, 3, 1, 1, count_include_pad=False) - images)
        images = images + 0.05 * torch.rand_like(blur) * torch.randn_like(images)
        logits = self.classifier(images)
        losses = {name: F.cross_entropy(logits[name], batch["labels"][:, i]) for i, name in enumerate(CHOICES)}
        hits = {
            f"train/{name}": (logits[name].argmax(1) == batch["labels"][:, i]).float().mean()
            for i, name in enumerate(CHOICES)
        }
        loss = torch.stack(list(losses.values())).sum()
        self.log_dict({"train/loss": loss, **hits}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        return adamw(self.classifier.parameters(), self.learning_rate, self.trainer.max_steps)

    def weights(self) -> dict[str, Tensor]:
        return self.classifier.state_dict()
