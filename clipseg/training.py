"""Trains a small CLIPSeg from nothing: both towers and the decoder together."""

import math

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clipseg.modeling_clipseg import CLIPSegModel

from clipseg.model import ClipSeg
from ldm.optimise import adamw


class ClipSegTraining(pl.LightningModule):
    """Learns from nothing what CLIPSeg takes from CLIP and what it adds, at once.

    The loss is the binary cross-entropy of every pixel (Lüddecke and Ecker 2022, section 4) and, so that the towers
    come to speak of the same things, a contrastive one: what CLIP makes of the patches under a mask is to be nearer to
    the texts that name it than to the other texts of the batch, and the other way round.

    Batches: {"images": (B, 3, H, W) in [-1, 1], "masks": (B, P, H, W) in [0, 1], "prompts": P lists of B, "nouns": the
    words in these prompts that matter, likewise}. A mask is empty where its prompt names what the image does not show.

    Args:
        clipseg: its decoder is drawn anew; its last chosen layer must be the image tower's last.
        learning_rate: of AdamW, the highest.
        contrast: weight of the contrastive loss.
    """

    def __init__(self, clipseg: ClipSeg, learning_rate: float = 1e-3, contrast: float = 0.2):
        super().__init__()
        self.clipseg, self.learning_rate, self.contrast = clipseg, learning_rate, contrast
        for module in clipseg.network.decoder.modules():  # transformers draws most of it with a deviation of 1
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                module.reset_parameters()

    def training_step(self, batch: dict, index: int) -> Tensor:
        features = self.clipseg.features((batch["images"] + 1) / 2)
        conditions = [self.clipseg.conditions(prompts) for prompts in batch["prompts"]]  # P of (B, D)
        logits = torch.stack([self.clipseg.decode(features, condition) for condition in conditions], 1).float()
        masks = F.interpolate(batch["masks"], logits.shape[2:], mode="bilinear")  # (B, P, S, S)
        pixels = F.binary_cross_entropy_with_logits(logits, masks)
        regions, shown = self.regions(features[-1], batch["masks"])
        nouns = sum(batch["nouns"], [])
        same = torch.tensor([[one == other for other in nouns] for one in nouns], device=self.device)  # (P B, P B)
        words = contrast(regions[shown], torch.cat(conditions).float(), same[shown], self.clipseg.network.clip)
        found, true = logits > 0, masks > 0.5
        iou = (found & true).sum() / (found | true).sum().clamp(min=1)
        self.log_dict({"train/loss": pixels, "train/contrast": words, "train/iou": iou}, prog_bar=True)
        return pixels + self.contrast * words

    def regions(self, tokens: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """CLIP's image features of what lies under masks.

        Args:
            tokens: (B, 1 + N, W), the image tower's last. masks: (B, P, H, W).

        Returns:
            (P B, D), and whether there is more than a patch under the mask, (P B,) bool.
        """
        clip, side = self.clipseg.network.clip, math.isqrt(tokens.shape[1] - 1)
        weight = F.adaptive_avg_pool2d(masks, side).flatten(2)  # (B, P, N)
        pooled = torch.einsum("bpn,bnw->pbw", weight, tokens[:, 1:].float()).flatten(0, 1)  # (P B, W)
        area = weight.sum(2).T.flatten()  # (P B,), in patches
        pooled = pooled / area.clamp(min=1)[:, None]
        return clip.visual_projection(clip.vision_model.post_layernorm(pooled)).float(), area > 1

    def configure_optimizers(self) -> dict:
        return adamw(self.clipseg.parameters(), self.learning_rate, self.trainer.max_steps, weight_decay=0.05)

    def weights(self) -> dict[str, Tensor]:
        return self.clipseg.network.state_dict()


def contrast(images: Tensor, texts: Tensor, same: Tensor, clip: CLIPSegModel) -> Tensor:
    """Cross-entropy between features of R images and T texts, where several may belong together.

    Radford et al. 2021 (figure 3), with the target spread evenly over all that belong together.

    Args:
        images: (R, D). texts: (T, D). same: (R, T) bool; a text of no image counts as a wrong answer only.
        clip: has the temperature.
    """
    cosines = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    logits = clip.logit_scale.clamp(max=4.6).exp() * cosines  # (R, T)
    losses = []
    for scores, right in ((logits, same), (logits.T, same.T)):
        scores, right = scores[right.any(1)], right[right.any(1)]
        losses.append(-(scores.log_softmax(1) * right).sum(1) / right.sum(1))
    return torch.cat(losses).mean()
