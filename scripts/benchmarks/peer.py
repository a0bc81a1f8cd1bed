"""This repository's UNet and diffusers', with the same weights on the same inputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from ldm.pipeline import StableDiffusion
from ldm.weights.export import diffusers_tensors, unet_config
from scripts.benchmarks.inputs import TIMESTEP, drawn
from scripts.benchmarks.model import autocast
from scripts.benchmarks.settings import PEERS, Settings
from scripts.benchmarks.timing import Case


def unet_calls(sd: StableDiffusion, settings: Settings) -> list[Case]:
    """One call of the UNet without guidance, and of diffusers' with the same weights and inputs, forward only.

    Both attend by `scaled_dot_product_attention`; a call gives the prediction (B, C, h, w).
    """
    latents = drawn(settings.batch, sd, settings).to(sd.dtype)
    with torch.no_grad():
        text = sd.text(["a photo of a cat"] * settings.batch).to(sd.dtype)
    timesteps = torch.full((settings.batch,), TIMESTEP, device=latents.device)
    peer = diffusers_unet(sd, settings)
    calls = (
        lambda: sd.unet(latents, timesteps, text),
        lambda: peer(latents, timesteps, text, return_dict=False)[0],
    )

    def case(name: str, call: Callable[[], Tensor]) -> Case:
        @contextmanager
        def ready() -> Iterator[Callable[[int], Tensor]]:
            with torch.no_grad(), autocast(sd, settings):
                yield lambda steps: [call() for _ in range(steps)][-1]

        return Case(name, ready)

    return [case(name, call) for name, call in zip(PEERS, calls, strict=True)]


def diffusers_unet(sd: StableDiffusion, settings: Settings) -> nn.Module:
    """diffusers' UNet with this model's weights, frozen."""
    with torch.device("meta"):  # holds no second copy while the weights are on their way
        peer = UNet2DConditionModel.from_config(unet_config(sd.unet, settings.latent))
    peer.load_state_dict(diffusers_tensors(sd.unet, sd.dtype), assign=True)
    peer.set_attn_processor(AttnProcessor2_0())
    peer = peer.requires_grad_(False).eval().to(sd.device)
    if settings.compile:
        peer.compile(dynamic=False)
    return peer


def check_agreement(a: Case, b: Case, settings: Settings) -> float:
    """‖a − b‖ / ‖b‖ of what two cases give.

    Raises:
        RuntimeError: it is more than rounding explains, which is 2e-4 in float32, 5e-3 in float32 on CUDA, whose
            convolutions may use TF32, and 5e-2 in half precision.
    """
    predictions = []
    for case in (a, b):
        with case.ready() as run, torch.compiler.set_stance("force_eager"):
            predictions.append(run(1).double())
    ours, theirs = predictions
    difference = ((ours - theirs).norm() / theirs.norm()).item()
    tolerance = 5e-3 if torch.device(settings.device).type == "cuda" else 2e-4
    tolerance = tolerance if settings.precision == "full" else 5e-2
    if not difference <= tolerance:
        raise RuntimeError(
            f"{a.name} and {b.name} differ by {difference:.1e} of their norm, so their times say nothing"
        )
    return difference
