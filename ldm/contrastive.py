"""Trains CLIP."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.clip import Clip
from ldm.optimise import adamw


class ClipTraining(pl.LightningModule):
    """The symmetric contrastive loss of Radford et al. 2021 (figure 3).

    Batches: {"images": (B, 3, H, W) in [-1, 1], "captions": list of B}.
    """

    def __init__(self, clip: Clip, learning_rate: float = 1e-3):
        super().__init__()
        self.clip, self.learning_rate = clip, learning_rate

    def training_step(self, batch: dict, index: int) -> Tensor:
        images = self.clip.image_features((batch["images"] + 1) / 2)
        texts = self.clip.text_features(batch["captions"])
        logits = self.clip.logit_scale.clamp(max=4.6).exp() * images @ texts.T  # (B, B)
        pairs = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        hits = (logits.argmax(1) == pairs).float().mean()
        self.log_dict({"train/loss": loss, "train/retrieval": hits}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        return adamw(self.clip.parameters(), self.learning_rate, self.trainer.max_steps, weight_decay=0.1)

    def weights(self) -> dict[str, Tensor]:
        return self.clip.state_dict()
