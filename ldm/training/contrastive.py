"""Trains CLIP."""

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.clip import Clip
from ldm.training.optimise import adamw


class ClipTraining(pl.LightningModule):
    """The symmetric contrastive loss of Radford et al. 2021 (figure 3), with labels to read where the data has them.

    A contrast needs no more of a caption than tells the batch apart, and it skips what is hard to see, such as places.
    So both towers also read out the labels, through one linear layer that they share, and that is not exported.
    Batches: {"images": (B, 3, H, W) in [-1, 1], "captions": list of B, "labels": (B, parts) int64}.

    Args:
        parts: number of classes of each label; none, and only the contrast is trained.
    """

    def __init__(self, clip: Clip, learning_rate: float = 1e-3, parts: Sequence[int] = ()):
        super().__init__()
        self.clip, self.learning_rate = clip, learning_rate
        self.parts = list(parts)
        self.reader = nn.Linear(clip.text_projection.out_features, sum(self.parts)) if self.parts else None

    def training_step(self, batch: dict, index: int) -> Tensor:
        images = self.clip.image_features((batch["images"] + 1) / 2)
        texts = self.clip.text_features(batch["captions"])
        logits = self.clip.logit_scale.clamp(max=4.6).exp() * images @ texts.T  # (B, B)
        pairs = torch.arange(len(logits), device=logits.device)
        contrast = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        hits = (logits.argmax(1) == pairs).float().mean()
        self.log_dict({"train/contrast": contrast, "train/retrieval": hits}, prog_bar=True)
        if self.reader is None:
            return contrast
        of_images, of_texts = self.reading(images, batch["labels"]), self.reading(texts, batch["labels"])
        self.log_dict({"train/images_read": of_images, "train/texts_read": of_texts}, prog_bar=True)
        return contrast + of_images + of_texts

    def reading(self, features: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the labels (B, parts) given features (B, F) of unit length, summed over the parts."""
        logits = self.reader(features * features.shape[-1] ** 0.5).split(self.parts, dim=1)
        losses = [F.cross_entropy(of, wanted) for of, wanted in zip(logits, labels.unbind(1), strict=True)]
        return torch.stack(losses).sum()

    def configure_optimizers(self) -> dict:
        return adamw(self.parameters(), self.learning_rate, self.trainer.max_steps, weight_decay=0.1)

    def weights(self) -> dict[str, Tensor]:
        return self.clip.state_dict()
