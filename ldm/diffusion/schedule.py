"""The noise schedule of latent diffusion, and every sampler's scheduler built from it in one place."""

from typing import Literal

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ldm.diffusion.schedulers import SAMPLERS
from ldm.util.cli import UserError


class Schedule:
    """β linear in √β; x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε (Ho et al. 2020, eq. 4; Rombach et al. 2022).

    Shapes below: latents, noise, noisy and prediction (B, C, h, w); timesteps int64 (B,) in [0, timesteps), or a
    scalar tensor. Results have the latents' dtype and device; a prediction is what the UNet returns, ε or v.

    Args:
        timesteps: number of training timesteps.
        beta_start, beta_end: first and last β.
        prediction_type: what the UNet predicts: "epsilon", or "v_prediction" (Salimans and Ho 2022, appendix D).

    Attributes:
        alphas_cumprod: ᾱ, float32 (timesteps,), on the CPU.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    ) -> None:
        if timesteps < 1 or not 0 < beta_start <= beta_end < 1:
            raise UserError(f"no schedule has {timesteps} steps with β from {beta_start} to {beta_end}")
        self.timesteps, self.beta_start, self.beta_end = timesteps, beta_start, beta_end
        self.prediction_type = prediction_type
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64, device="cpu")
        self.alphas_cumprod = (1 - roots**2).cumprod(0).float()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents diffused to `timesteps`: √ᾱ x_0 + √(1 − ᾱ) ε."""
        signal, sigma = self._rates(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should predict: ε, or v = √ᾱ ε − √(1 − ᾱ) x_0."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._rates(timesteps, latents)
        return signal * noise - sigma * latents

    def to_epsilon(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The noise ε that a prediction stands for; from v: √ᾱ v + √(1 − ᾱ) x_t."""
        if self.prediction_type == "epsilon":
            return prediction
        signal, sigma = self._rates(timesteps, noisy)
        return signal * prediction + sigma * noisy

    def scheduler(self, name: str = "ddim") -> SchedulerMixin:
        """A fresh diffusers scheduler of this schedule; `name` is a key of `SAMPLERS`.

        Raises:
            ValueError: unknown name.
        """
        if name not in SAMPLERS:
            raise UserError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
        scheduler, arguments = SAMPLERS[name]
        return getattr(diffusers, scheduler)(
            num_train_timesteps=self.timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            beta_schedule="scaled_linear",
            prediction_type=self.prediction_type,
            **arguments,
        )

    def _rates(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 − ᾱ), each (B, 1, 1, 1), or (1, 1, 1, 1) for a scalar timestep."""
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].to(like.device).view(-1, 1, 1, 1)
        return alphas.sqrt().to(like.dtype), (1 - alphas).sqrt().to(like.dtype)
