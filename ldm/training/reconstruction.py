"""Trains the KL autoencoder."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.autoencoder import AutoencoderKL
from ldm.training.optimise import adamw


class AutoencoderTraining(pl.LightningModule):
    """Reconstruction (L1 + L2) with a small KL term, eq. 25 of Rombach et al. 2022 without its adversarial part.

    Batches: {"images": (B, 3, H, W) in [-1, 1]}. Logs the standard deviation of the latents: 1 / it is the model's
    `scale_factor`.
    """

    def __init__(
        self, vae: AutoencoderKL, learning_rate: float = 1.5e-3, kl_weight: float = 5e-4, compile: bool = False
    ):
        super().__init__()
        self.vae, self.learning_rate, self.kl_weight = vae, learning_rate, kl_weight
        if compile:
            self.vae.encoder.compile()
            self.vae.decoder.compile()

    def training_step(self, batch: dict, index: int) -> Tensor:
        images = batch["images"]
        mean, logvar = self.vae.moments(images)  # (B, C, h, w) each
        latents = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        decoded = self.vae.decode(latents * self.vae.scale_factor).float()
        l1 = F.l1_loss(decoded, images)
        kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
        loss = l1 + F.mse_loss(decoded, images) + self.kl_weight * kl
        self.log_dict(
            {"train/loss": loss, "train/l1": l1, "train/kl": kl, "train/latent_std": mean.float().std()}, prog_bar=True
        )
        return loss

    def configure_optimizers(self) -> dict:
        return adamw(self.vae.parameters(), self.learning_rate, self.trainer.max_steps, weight_decay=0.0)

    def weights(self) -> dict[str, Tensor]:
        return self.vae.state_dict()
