"""Trains the pocket world's CLIP."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.pocket_two.batches import words_of
from data.pocket_two.reading import PRESENT, presence
from data.pocket_two.scene import CHOICES
from ldm.models.clip import Clip
from ldm.training.optimise import adamw


class ClipTraining(pl.LightningModule):
    """The symmetric contrastive loss of Radford et al. 2021 (figure 3), and words of the scene to read.

    A contrast needs no more of a caption than tells the batch apart, and it skips what is hard to see. So both towers
    also say which words a scene has, through one linear layer that they share, and that is not kept. Batches: images
    (B, 3, 64, 64) in [-1, 1], captions, table (B, 14).
    """

    def __init__(self, clip: Clip, learning_rate: float = 1e-3):
        super().__init__()
        self.clip, self.learning_rate = clip, learning_rate
        self.reader = nn.Linear(clip.text_projection.out_features, sum(len(CHOICES[part]) for part in PRESENT))

    def training_step(self, batch: dict, index: int) -> Tensor:
        images = self.clip.image_features((batch["images"] + 1) / 2)
        texts = self.clip.text_features(batch["captions"])
        logits = self.clip.logit_scale.clamp(max=4.6).exp() * images @ texts.T  # (B, B)
        pairs = torch.arange(len(logits), device=logits.device)
        contrast = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        present = torch.stack([presence(words) for words in words_of(batch["table"].cpu())]).to(images)
        losses = {
            f"train/{name}": F.binary_cross_entropy_with_logits(
                self.reader(features * features.shape[-1] ** 0.5), present
            )
            for name, features in (("images_read", images), ("texts_read", texts))
        }
        hits = (logits.argmax(1) == pairs).float().mean()
        self.log_dict({"train/contrast": contrast, "train/retrieval": hits, **losses}, prog_bar=True)
        return contrast + 20 * sum(losses.values())

    def configure_optimizers(self) -> dict:
        return adamw(self.parameters(), self.learning_rate, self.trainer.max_steps, weight_decay=0.1)

    def weights(self) -> dict[str, Tensor]:
        return self.clip.state_dict()
