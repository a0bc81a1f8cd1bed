"""Sampling: a denoiser, a scheduler, and one source of noise per image."""

import inspect
from collections.abc import Callable, Sequence

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn
from tqdm.auto import tqdm

from ldm.models.attention import Context
from ldm.util.cli import UserError, check_range

Denoiser = Callable[[Tensor, Tensor], Tensor]


class Guided:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, eq. 6): two rows per image, one UNet call.

    Args:
        unet: (latents, timesteps (B,), `Context` of B rows) -> prediction.
        context: of the prompts, B rows; its text's dtype is the one that the UNet runs in.
        negative: what to guide away from, B rows or one; usually that of "".
        scale: guidance; 1 is none, and then the second row is not computed.
    """

    def __init__(self, unet: nn.Module, context: Context, negative: Context, scale: float) -> None:
        self.unet, self.scale = unet, scale
        rows = len(context.text)
        together = [negative.map(lambda row: row.expand(rows, *row.shape[1:])), context]
        self.context = context if scale == 1 else Context.cat(together)

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """Guided prediction (B, C, h, w) for latents (B, C, h, w) at one int64 timestep (scalar tensor)."""
        text = self.context.text
        rows = len(text) // len(latents)
        inputs = latents.to(text.dtype).repeat(rows, 1, 1, 1)
        prediction = self.unet(inputs, timestep.expand(len(inputs)), self.context).to(latents.dtype)
        if rows == 1:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


def initial_noise(
    seeds: Sequence[int | torch.Generator],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise (B, *shape), each image's drawn in float32 from its own CPU generator.

    Args:
        seeds: one per image: a seed, or a CPU generator, which is advanced.
        shape: (C, h, w).
    """
    own = [s if isinstance(s, torch.Generator) else torch.Generator("cpu").manual_seed(s) for s in seeds]
    rows = [torch.randn(tuple(shape), generator=generator, device="cpu") for generator in own]
    return torch.stack(rows).to(device)


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: SchedulerMixin,
    latents: Tensor,
    steps: int,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    progress: bool = False,
) -> Tensor:
    """Denoise standard normal noise into latents.

    Args:
        denoise: (latents (B, C, h, w), timestep: scalar int64 tensor on their device) -> the model's prediction,
            guidance included.
        scheduler: from `Schedule.scheduler`, used for this call only.
        latents: standard normal noise (B, C, h, w), float32 whatever the model's precision.
        steps: number of steps, below the number of training timesteps.
        eta: share of DDIM's noise in [0, 1] (Song et al. 2020, eq. 16); 0 is deterministic. DDIM only.
        generators: one CPU generator per image, for the noise of eta > 0 and of ancestral samplers;
            None draws from torch's global one.
        progress: show a progress bar.

    Returns:
        Latents like `latents`.

    Raises:
        ValueError: an argument is out of range, or the scheduler has no `eta`.
    """
    trained = scheduler.config.num_train_timesteps
    check_range("steps", steps, 1, trained - 1)
    check_range("eta", eta, 0, 1)
    if generators is not None and len(generators) != len(latents):
        raise ValueError(f"{len(generators)} generators for {len(latents)} images")
    accepted = inspect.signature(scheduler.step).parameters
    if eta > 0 and "eta" not in accepted:
        raise UserError("only the ddim sampler takes eta > 0")
    options = {"eta": eta, "generator": None if generators is None else list(generators)}
    options = {name: value for name, value in options.items() if name in accepted}

    scheduler.set_timesteps(steps, device=latents.device)
    latents = latents * scheduler.init_noise_sigma
    for t in tqdm(scheduler.timesteps, desc="sampling", disable=not progress):
        inputs = scheduler.scale_model_input(latents, t)
        prediction = denoise(inputs, t.round().long()).to(latents.dtype)
        latents = scheduler.step(prediction, t, latents, **options).prev_sample
    return latents
