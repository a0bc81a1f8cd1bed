"""Trains a text-conditional latent diffusion model."""

from contextlib import nullcontext
from dataclasses import replace

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.pipeline import StableDiffusion
from ldm.training.optimise import adamw
from ldm.util.cli import UserError
from ldm.weights.checkpoint import checkpoint_tensors


class LatentDiffusion(pl.LightningModule):
    """The denoising loss of Ho et al. 2020 (eq. 14) on latents (Rombach et al. 2022, eq. 3).

    The UNet is trained, the text encoder if `train_text`, the autoencoder is not. A share of the captions is emptied,
    for classifier-free guidance. `min_snr` is γ of Hang et al. 2023 (eq. 7): the loss on ε is weighted by
    min(SNR, γ) / SNR, so that steps with little noise do not take most of the capacity. `clean_weight` adds so much of
    the loss on the clean latents, which is the one on ε by the SNR, and `layout_share` of the timesteps come from the
    last fifth alone: where things stand is decided there, and ε hardly depends on it. Batches: {"latents":
    (B, C, h, w), "captions": list of B}, and if need be "sizes": (B, 6), see `Context`, for what are no whole pictures.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        learning_rate: float = 6e-4,
        caption_dropout: float = 0.1,
        min_snr: float = 5.0,
        clean_weight: float = 0.0,
        layout_share: float = 0.0,
        train_text: bool = True,
        compile: bool = False,
    ):
        super().__init__()
        if sd.schedule.prediction_type != "epsilon":
            raise UserError(f"min_snr weights an ε-prediction, and this model predicts {sd.schedule.prediction_type}")
        self.sd, self.learning_rate, self.caption_dropout = sd, learning_rate, caption_dropout
        self.min_snr, self.clean_weight, self.layout_share = min_snr, clean_weight, layout_share
        self.sd.vae.requires_grad_(False)
        self.sd.text.requires_grad_(train_text)
        # for training alone: each shape takes minutes to compile, and samples have others
        self.predict = torch.compile(self.sd.unet.forward, dynamic=False) if compile else self.sd.unet.forward

    def training_step(self, batch: dict, index: int) -> Tensor:
        latents = batch["latents"]
        dropped = torch.rand(len(latents)) < self.caption_dropout
        captions = ["" if drop else caption for drop, caption in zip(dropped, batch["captions"], strict=True)]
        context = replace(self.sd.text.conditioning(captions), sizes=batch.get("sizes"))
        timesteps = self.timesteps(len(latents)).to(latents.device)
        noise = torch.randn_like(latents)
        noisy = self.sd.schedule.add_noise(latents, noise, timesteps)
        # the backward pass of the fused CPU kernel takes a third of a step at these sizes
        with sdpa_kernel(SDPBackend.MATH) if latents.device.type == "cpu" else nullcontext():
            prediction = self.predict(noisy, timesteps, context)
        errors = F.mse_loss(prediction.float(), noise, reduction="none").mean((1, 2, 3))  # (B,)
        signal = self.sd.schedule.alphas_cumprod.to(latents.device)[timesteps]
        snr = signal / (1 - signal)
        loss = (errors * (snr.clamp(max=self.min_snr) + self.clean_weight) / snr).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def timesteps(self, count: int) -> Tensor:
        """Random timesteps (count,) int64: uniform, but for `layout_share` of them, which lie in the last fifth."""
        last = self.sd.schedule.timesteps
        first = torch.where(torch.rand(count) < self.layout_share, last - last // 5, 0)
        return first + (torch.rand(count) * (last - first)).long()

    def configure_optimizers(self) -> dict:
        trained = [parameter for parameter in self.sd.parameters() if parameter.requires_grad]
        return adamw(trained, self.learning_rate, self.trainer.max_steps)

    def weights(self) -> dict[str, Tensor]:
        return checkpoint_tensors(dict(self.sd.named_children()))
