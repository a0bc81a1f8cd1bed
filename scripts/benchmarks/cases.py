"""What the timed cases do, and which of them are measured in turn."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from data.prompts import TEMPLATES
from infusion.inject import edited, remove
from infusion.methods.infusion import Infusion
from infusion.sampling import settings as sampling
from infusion.sampling.customised import Customised
from infusion.training.trainer import ConceptTrainer
from ldm.pipeline import StableDiffusion
from scripts.benchmarks.inputs import NOUNS, TIMESTEP, drawn, random_concepts, training_batch
from scripts.benchmarks.model import autocast
from scripts.benchmarks.reenactment import ReleasedDesign, recomputing
from scripts.benchmarks.settings import GUIDED, IMAGE, OPTIMISER, OPTIMISER_STEPS, STEPS, TRAIN, Settings
from scripts.benchmarks.timing import Case

SCALE = 7.5


def guided_steps(sd: StableDiffusion, settings: Settings) -> list[Case]:
    """One guided step of the sampler's denoiser on the same latents: the base model, one concept, eight in a prompt."""
    counts = (0, 1, len(NOUNS))
    return [guided_step(sd, settings, name, count) for name, count in zip(GUIDED, counts, strict=True)]


def guided_step(sd: StableDiffusion, settings: Settings, name: str, concepts: int) -> Case:
    """A guided step with so many concepts; the step gives the prediction (B, C, h, w)."""
    slots = [f"{{{i + 1}}}" for i in range(concepts)] or [NOUNS[0]]
    prompts = [f"a photo of a {', a '.join(slots)}"] * settings.batch
    customised = Customised(sd, random_concepts(sd, concepts), sampling.Settings(scale=SCALE)) if concepts else None
    denoise = customised(prompts) if concepts else sd.guided(prompts, scale=SCALE)
    latents = drawn(settings.batch, sd, settings)
    timestep = torch.tensor(TIMESTEP, device=latents.device)

    @contextmanager
    def ready() -> Iterator[Callable[[int], Tensor]]:
        with customised or nullcontext(), torch.no_grad(), autocast(sd, settings):
            yield lambda steps: [denoise(latents, timestep) for _ in range(steps)][-1]

    return Case(name, ready)


def train_steps(sd: StableDiffusion, settings: Settings) -> list[Case]:
    """An optimiser step on cached latents and text without checkpointing, and one of the released design."""
    images = torch.rand(settings.batch, 3, *(settings.latent * sd.vae.factor,) * 2, device=sd.device) * 2 - 1
    released = ReleasedDesign(sd, NOUNS[0], TEMPLATES)
    batch = training_batch(sd, settings)

    def run(steps: int) -> Tensor:
        for step in range(steps):
            generator = torch.Generator().manual_seed(step)
            loss = released.step(images, batch["template"], batch["mask"], generator, autocast(sd, settings))
        return loss

    @contextmanager
    def ready() -> Iterator[Callable[[int], Tensor]]:
        with released.ready():
            yield run

    return [train_step(sd, settings, TRAIN[0]), Case(TRAIN[1], ready)]


def train_step(
    sd: StableDiffusion,
    settings: Settings,
    name: str,
    checkpointing: bool = False,
    steps: int = 1,
    fused: bool | None = None,
) -> Case:
    """Optimiser steps of `ConceptTrainer`, a batch each; they give the last loss."""
    trainer = ConceptTrainer(sd, Infusion(), NOUNS[0], TEMPLATES).to(sd.device)
    remove(sd.unet)  # the trainer's edits, which are there inside ready() only
    optimiser, batch = trainer.configure_optimizers(), training_batch(sd, settings)
    if fused is not None:
        optimiser = torch.optim.AdamW(trainer.tensors.values(), lr=trainer.learning_rate, fused=fused)
    trainer.encode(TEMPLATES)

    def run(steps: int) -> Tensor:
        for step in range(steps):
            with autocast(sd, settings):
                loss = trainer.denoising_loss(batch, torch.Generator().manual_seed(step), {})
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        return loss.detach()

    @contextmanager
    def ready() -> Iterator[Callable[[int], Tensor]]:
        with edited(sd.unet, trainer.edits), recomputing(sd.unet, checkpointing):
            yield run

    return Case(name, ready, steps)


def optimiser_steps(sd: StableDiffusion, settings: Settings) -> list[Case]:
    """Several optimiser steps in a row."""
    return [train_step(sd, settings, OPTIMISER, steps=OPTIMISER_STEPS)]


def images(sd: StableDiffusion, settings: Settings) -> list[Case]:
    """Guided images with a concept, from noise to pixels; they are (B, 3, H, W) in [0, 1]."""
    customised = Customised(sd, random_concepts(sd, 1), sampling.Settings(scale=SCALE))
    denoise = customised(["a photo of a {}"] * settings.batch)
    side, seeds = settings.latent * sd.vae.factor, range(settings.batch)

    @contextmanager
    def ready() -> Iterator[Callable[[int], Tensor]]:
        with customised, autocast(sd, settings):
            yield lambda steps: sd.decode(sd.draw_latents(denoise, seeds, steps, height=side, width=side))

    return [Case(IMAGE, ready, STEPS)]
