"""The training step of the released code's design, re-enacted: what the cached, undoubled step is measured against."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from infusion.attention import OwnPass
from infusion.inject import edited
from infusion.loss import masked_loss
from infusion.methods.base import by_layer
from infusion.methods.infusion import Infusion
from infusion.sampling.encode import encode
from infusion.tokens import Word
from ldm.pipeline import StableDiffusion

LEARNING_RATE = 0.01


@contextmanager
def recomputing(unet: nn.Module, on: bool) -> Iterator[None]:
    """The UNet with gradient checkpointing, or without, inside the `with`."""
    before, unet.checkpoint = unet.checkpoint, on
    try:
        yield
    finally:
        unet.checkpoint = before


class ReleasedDesign:
    """An optimiser step as the released code's design does it (docs/performance.md), by this repository's own parts.

    - Every step encodes the images by the autoencoder and the prompts by the text encoder.
    - Both streams are one batch of twice the size: the customised rows, whose gate is 1 on the concept's tokens, then
      the foundation rows, whose gate is 0. Each row attends with its own queries, so the streams do not meet.
    - All rows are computed with gradients, under gradient checkpointing; the foundation rows are then thrown away.
    - AdamW trains the residual values, and nothing else has gradients.

    Where the design leaves a choice, the cheaper one is taken: the prompts are encoded once, not once for each stream;
    latents are the posterior's mean; the frozen weights get no gradients. Blocks are recomputed one by one, as
    `UNet.checkpoint` has it.

    Args:
        sd: the base model, frozen; the UNet has the edits inside `ready()` only.
        noun: stands in the prompts for the concept.
        templates: prompts that the method starts from.

    Attributes:
        tensors: layer -> residual value, float32, learned.
    """

    def __init__(self, sd: StableDiffusion, noun: str, templates: Sequence[str]) -> None:
        method, word = Infusion(attention="own"), Word(noun, tuple(templates))
        self.sd, self.noun = sd, noun
        self.tensors = method.start(sd, word)
        self.edits = by_layer(method.terms(sd, self.tensors, word))
        for edit in self.edits.values():
            edit.to(sd.device)
        self.optimiser = torch.optim.AdamW(self.tensors.values(), lr=LEARNING_RATE)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The UNet with the edits, and with gradient checkpointing, inside the `with`."""
        with edited(self.sd.unet, self.edits), recomputing(self.sd.unet, True):
            yield

    def loss(self, images: Tensor, templates: Sequence[str], mask: Tensor, generator: torch.Generator) -> Tensor:
        """The masked denoising loss of a batch.

        Args:
            images: (B, 3, H, W) in [-1, 1]. templates: B prompts. mask: (B, 1, h, w) in [0, 1].
            generator: of timesteps, then noise, on the CPU.

        Returns:
            Scalar float32.
        """
        schedule = self.sd.schedule
        with torch.no_grad():
            latents = self.sd.vae.encode(images)  # (B, C, h, w)
            text, places = encode(self.sd.text, templates, [self.noun])  # (B, L, D), (B, 1, L)
        timesteps = torch.randint(schedule.timesteps, (len(latents),), generator=generator).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = schedule.add_noise(latents, noise, timesteps).to(self.sd.dtype)
        gates = places.to(text.device, torch.float32)
        gates = torch.cat([gates, torch.zeros_like(gates)])  # (2B, 1, L)
        text = text.to(self.sd.dtype).repeat(2, 1, 1)  # (2B, L, D)
        context = OwnPass(text, gates, {}, torch.ones(1, device=latents.device))
        both = self.sd.unet(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), context)  # (2B, C, h, w)
        customised, _ = both.chunk(2)
        return masked_loss(customised, schedule.target(latents, noise, timesteps), mask)

    def step(
        self,
        images: Tensor,
        templates: Sequence[str],
        mask: Tensor,
        generator: torch.Generator,
        forward: AbstractContextManager | None = None,
    ) -> Tensor:
        """One step of the optimiser, inside `ready()`; `forward` is what the loss is computed within.

        Returns:
            The loss, scalar float32.
        """
        with nullcontext() if forward is None else forward:
            loss = self.loss(images, templates, mask, generator)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.detach()
