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
    `scale_factor`, and the peak signal-to-noise ratio (dB).

    Args:
        kl_weight: weight of the KL divergence, a mean over the latents' numbers.
        edge_weight: weight of the L1 distance between differences of neighbouring pixels, which keeps edges sharp.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        learning_rate: float = 1.5e-3,
        kl_weight: float = 5e-4,
        edge_weight: float = 0.0,
        compile: bool = False,
    ):
        super().__init__()
        self.vae, self.learning_rate, self.kl_weight, self.edge_weight = vae, learning_rate, kl_weight, edge_weight
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
        squared = F.mse_loss(decoded, images)
        loss = l1 + squared + self.kl_weight * kl
        if self.edge_weight:
            error = decoded - images
            edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
            loss = loss + self.edge_weight * edges
        psnr = -10 * (squared.detach() / 4).log10()  # images span 2
        self.log_dict({"train/loss": loss, "train/l1": l1, "train/kl": kl, "train/psnr": psnr,
                       "train/latent_std": mean.float().std()}, prog_bar=True)  # fmt: skip
        return loss

    def configure_optimizers(self) -> dict:
        return adamw(self.vae.parameters(), self.learning_rate, self.trainer.max_steps, weight_decay=0.0)

    def weights(self) -> dict[str, Tensor]:
        return self.vae.state_dict()
