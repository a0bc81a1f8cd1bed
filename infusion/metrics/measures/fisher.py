"""Latent Fisher divergence: how far a customised model's predictions are from the base model's.

    LFD = E over c, t, x_t of ‖ε'(x_t, t, c) − ε(x_t, t, c)‖² / dim,    x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) n

with x_0 the base model's own samples of the prompts c (Infusion, arXiv 2404.14007, has the name and the idea). A score
is −ε / σ_t with σ_t² = 1 − ᾱ_t (Song et al. 2021, section 3.3), so weighting by 1 / σ_t² gives E ‖s' − s‖² / dim, as in
a Fisher divergence; without, every noise level counts alike. The expectation is not under either model's own law of
x_t: `infusion.metrics.run` draws x_0 with the guidance of `--scale`, 7.5 by default, and both predictions are without
guidance. So LFD is a mean squared gap of scores under the noised law of *guided base samples*; at `--scale 1` that law
is the base model's own, and LFD its Fisher divergence from the customised one.

The expectation over t is stratified: one t from each of J equal parts of the schedule for every sample. Noise and t
depend on a sample's seed and the stratum alone, so methods are compared on common random numbers, and a sample's errors
on no other sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from infusion.metrics.measures.estimate import Estimate, mean
from ldm.diffusion.sampler import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.util.cli import UserError


@dataclass(frozen=True)
class Divergence:
    """Errors of N samples in J strata.

    Attributes:
        values: squared error per number, (N, J) float64, on the CPU.
        timesteps: where each was measured, (N, J) int64.
        span: timesteps of the schedule.
    """

    values: Tensor
    timesteps: Tensor
    span: int

    def estimate(self) -> Estimate:
        """The divergence: unbiased, with the standard error over samples, which are the independent measurements."""
        return mean(self.values.mean(1))

    def curve(self) -> list[tuple[float, Estimate]]:
        """For each stratum its middle timestep, and the mean there."""
        strata = self.values.shape[1]
        return [((j + 0.5) * self.span / strata, mean(column)) for j, column in enumerate(self.values.T)]


@torch.no_grad()
def errors(
    base: Denoiser,
    customised: Denoiser,
    latents: Tensor,
    schedule: Schedule,
    seeds: Sequence[int],
    strata: int = 10,
    weighting: Literal["eps", "score"] = "eps",
    regions: Tensor | None = None,
) -> Divergence:
    """Errors of a customised model's predictions for samples of the base model.

    The denoisers are `sd.guided(prompts, scale=1.0)`, and what a `Customised` gives for these prompts at that scale.

    Args:
        base, customised: (latents (N, C, h, w), timesteps int64 (N,)) -> prediction, ε or v as the schedule says,
            without guidance; for the prompts of these N samples.
        latents: the base model's samples, scaled as the UNet takes them, (N, C, h, w).
        schedule: of both models.
        seeds: N integers ≥ 0, of noise and timesteps.
        strata: J, equal parts of the schedule.
        weighting: "eps" counts every noise level alike, "score" divides by σ_t².
        regions: share of each place that is the concept's, (N, 1, h, w) in [0, 1]; the mean is then over the places
            outside it, Σ (1 − m) e² / (C Σ (1 − m)).

    Returns:
        Errors in float64: exactly 0 where the predictions are the same.

    Raises:
        UserError: an image that is region everywhere.
    """
    outside = _outside(latents, regions)  # (N, 1, h, w)
    values, timesteps = [], []
    for stratum in range(strata):
        draws = [_draw(seed, stratum, strata, schedule.timesteps, latents.shape[1:]) for seed in seeds]
        t = torch.tensor([step for step, _ in draws], device=latents.device)  # (N,)
        noise = torch.stack([noise for _, noise in draws]).to(latents)
        noisy = schedule.add_noise(latents, noise, t)
        first, second = (_epsilon(denoise, noisy, t, schedule) for denoise in (base, customised))
        squares = (second - first).square() * outside  # (N, C, h, w)
        error = squares.sum((1, 2, 3)) / (latents.shape[1] * outside.sum((1, 2, 3)))
        t = t.cpu()
        if weighting == "score":
            error = error / (1 - schedule.alphas_cumprod.double()[t])
        values.append(error)
        timesteps.append(t)
    return Divergence(torch.stack(values, 1), torch.stack(timesteps, 1), schedule.timesteps)


def _draw(seed: int, stratum: int, strata: int, span: int, shape: torch.Size) -> tuple[int, Tensor]:
    """A timestep of a stratum, and standard normal noise (C, h, w).

    From a stream of their own: torch's generator with the same seed drew the noise that the sample grew from.
    """
    generator = np.random.default_rng([seed, stratum])
    step = int((stratum + generator.random()) * span / strata)
    return min(step, span - 1), torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def _epsilon(denoise: Denoiser, noisy: Tensor, timesteps: Tensor, schedule: Schedule) -> Tensor:
    """Predicted noise (N, C, h, w), float64 on the CPU: a difference of two keeps its digits."""
    prediction = denoise(noisy, timesteps).cpu().double()
    return schedule.to_epsilon(prediction, noisy.cpu().double(), timesteps.cpu())


def _outside(latents: Tensor, regions: Tensor | None) -> Tensor:
    """Weights (N, 1, h, w) of the places that count, float64 on the CPU."""
    if regions is None:
        return torch.ones(len(latents), 1, *latents.shape[2:], dtype=torch.float64)
    outside = 1 - regions.cpu().double()
    if covered := (outside.sum((1, 2, 3)) == 0).nonzero().flatten().tolist():
        raise UserError(f"image {covered[0]} is region everywhere: there is no outside to measure")
    return outside
