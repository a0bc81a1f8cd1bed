"""Trains CLIPSeg's decoder on a CLIP that stays as it is."""

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from clipseg.model import ClipSeg
from clipseg.weights import on_clip
from ldm.training.optimise import adamw


class ClipSegTraining(pl.LightningModule):
    """The binary cross-entropy of every pixel (Lüddecke and Ecker 2022, section 4).

    Batches: {"images": (B, 3, H, W) in [-1, 1], "masks": (B, P, H, W) in [0, 1], "prompts": P lists of B}. A mask is
    empty where its prompt names what the image does not show.

    Args:
        clipseg: its values do not matter.
        clip: file of the CLIP that it is to stand on, which is not trained.
        learning_rate: of AdamW, the highest.
        start: file of a decoder to start from; None draws one anew.

    Raises:
        ValueError: the file does not fit.
    """

    def __init__(
        self, clipseg: ClipSeg, clip: str | Path, learning_rate: float = 2e-3, start: str | Path | None = None
    ) -> None:
        super().__init__()
        self.clipseg, self.learning_rate = on_clip(clipseg, clip, start), learning_rate

    def training_step(self, batch: dict, index: int) -> Tensor:
        features = self.clipseg.features((batch["images"] + 1) / 2)
        conditions = [self.clipseg.conditions(prompts) for prompts in batch["prompts"]]  # P of (B, D)
        logits = torch.stack([self.clipseg.decode(features, condition) for condition in conditions], 1).float()
        masks = F.interpolate(batch["masks"], logits.shape[2:], mode="bilinear")  # (B, P, S, S)
        loss = F.binary_cross_entropy_with_logits(logits, masks)
        found, true = logits > 0, masks > 0.5
        iou = (found & true).sum() / (found | true).sum().clamp(min=1)
        self.log_dict({"train/loss": loss, "train/iou": iou}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        return adamw(self.clipseg.network.decoder.parameters(), self.learning_rate, self.trainer.max_steps)

    def weights(self) -> dict[str, Tensor]:
        return {f"decoder.{name}": tensor for name, tensor in self.clipseg.network.decoder.state_dict().items()}
