"""What is measured: each case makes ready, which is not timed, and then does some steps of its work."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from data.prompts import TEMPLATES
from infusion.concepts.concept import Concept
from infusion.inject import cross_attention_layers, edited, remove
from infusion.methods.infusion import Infusion
from infusion.sampling.customised import Customised
from infusion.sampling.settings import Settings as Sampling
from infusion.training.trainer import ConceptTrainer
from ldm.pipeline import StableDiffusion
from ldm.util.config import ROOT
from ldm.weights import checkpoint
from ldm.weights.export import diffusers_tensors, unet_config
from scripts.benchmarks.settings import Settings

DTYPES = {"full": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of weights
NOUNS = ("cat", "dog", "hat", "car", "fish", "tree", "bird", "boat")  # the superclasses of up to eight concepts
SCALE, TIMESTEP, STD = 7.5, 500, 0.02  # guidance; of single calls; of weights that a fresh model has as zeros
Run = Callable[[int], object]  # does so many steps, and gives the last one's result
Case = Callable[[StableDiffusion, Settings], AbstractContextManager[Run]]  # makes ready


def backbone(size: str) -> Path:
    """The config of an architecture."""
    return ROOT / "configs" / "backbone" / f"{size}.yaml"


def sides(size: str) -> tuple[int, int]:
    """What a latent's side must be divisible by, and its side in training."""
    with torch.device("meta"):
        sd = StableDiffusion.from_config(backbone(size))
    return sd.unet.factor, sd.image_size // sd.vae.factor


def build_model(settings: Settings) -> StableDiffusion:
    """A frozen model with random weights, the same on every call, none of which is zero throughout.

    A fresh UNet is zero where its residual branches end, so its prediction would be zero and agree with anything.
    """
    torch.manual_seed(0)
    with torch.device(settings.device):
        sd = StableDiffusion.from_config(backbone(settings.size))
    for parameter in sd.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=STD)
    sd.cast(DTYPES[settings.precision])
    if settings.compile:
        sd.unet.compile(dynamic=False)
    return sd.requires_grad_(False).to(settings.device)


def latents_of(sd: StableDiffusion, settings: Settings) -> Tensor:
    """Standard normal latents (B, C, h, w), the same on every call, in float32."""
    shape = (settings.batch, sd.vae.embed_dim, settings.latent, settings.latent)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(sd.device)


def random_concepts(sd: StableDiffusion, number: int) -> list[Concept]:
    """Infusion's concepts with random residuals, of other superclasses each."""
    generator, layers = torch.Generator().manual_seed(0), cross_attention_layers(sd.unet)
    concepts = []
    for noun in NOUNS[:number]:
        widths = {name: layer.heads * layer.dim_head for name, layer in layers.items()}
        residuals = {name: 0.1 * torch.randn(width, generator=generator) for name, width in widths.items()}
        concepts.append(Concept(residuals, noun, ("a photo of a {}",), sd.architecture, sd.hash))
    return concepts


@contextmanager
def guided_step(sd: StableDiffusion, settings: Settings, concepts: int) -> Iterator[Run]:
    """One step of classifier-free guidance on the same latents; it gives the prediction (B, C, h, w)."""
    slots = [f"{{{i + 1}}}" for i in range(concepts)] or [NOUNS[0]]
    prompts = [f"a photo of a {', a '.join(slots)}"] * settings.batch
    latents = latents_of(sd, settings)
    timestep = torch.tensor(TIMESTEP, device=latents.device)
    with ExitStack() as stack, torch.no_grad(), autocast(sd, settings):
        if concepts:
            customised = Customised(sd, random_concepts(sd, concepts), Sampling(scale=SCALE))
            denoise = stack.enter_context(customised)(prompts)
        else:
            denoise = sd.guided(prompts, scale=SCALE)
        yield lambda steps: [denoise(latents, timestep) for _ in range(steps)][-1]


@contextmanager
def image(sd: StableDiffusion, settings: Settings) -> Iterator[Run]:
    """Guided images with a concept, from noise to pixels, in so many steps; they are (B, 3, H, W) in [0, 1]."""
    side, seeds = settings.latent * sd.vae.factor, range(settings.batch)
    with Customised(sd, random_concepts(sd, 1), Sampling(scale=SCALE)) as customised, autocast(sd, settings):
        denoise = customised(["a photo of a {}"] * settings.batch)
        yield lambda steps: sd.decode(sd.draw_latents(denoise, seeds, steps, height=side, width=side))


@contextmanager
def unet(sd: StableDiffusion, settings: Settings, diffusers: bool = False) -> Iterator[Run]:
    """One call of the UNet without guidance, or of diffusers' with the same weights; it gives (B, C, h, w)."""
    latents = latents_of(sd, settings).to(sd.dtype)
    timesteps = torch.full((settings.batch,), TIMESTEP, device=latents.device)
    network = diffusers_unet(sd, settings) if diffusers else sd.unet
    with torch.no_grad(), autocast(sd, settings):
        text = sd.text(["a photo of a cat"] * settings.batch).to(sd.dtype)
        if diffusers:
            yield lambda steps: [network(latents, timesteps, text, return_dict=False)[0] for _ in range(steps)][-1]
        else:
            yield lambda steps: [network(latents, timesteps, text) for _ in range(steps)][-1]


def diffusers_unet(sd: StableDiffusion, settings: Settings) -> nn.Module:
    """diffusers' UNet with this model's weights, frozen; it attends by `scaled_dot_product_attention`, as ours."""
    with torch.device("meta"):  # holds no second copy while the weights are on their way
        peer = UNet2DConditionModel.from_config(unet_config(sd.unet, settings.latent))
    peer.load_state_dict(diffusers_tensors(sd.unet, sd.dtype), assign=True)
    peer = peer.requires_grad_(False).eval().to(sd.device)
    if settings.compile:
        peer.compile(dynamic=False)
    return peer


@contextmanager
def train_step(
    sd: StableDiffusion, settings: Settings, batch: int | None = None, checkpointing: bool = False
) -> Iterator[Run]:
    """Optimiser steps of `ConceptTrainer` on a batch of cached latents and text; they give the last loss."""
    settings = replace(settings, batch=batch or settings.batch)
    trainer = ConceptTrainer(sd, Infusion(), NOUNS[0], TEMPLATES).to(sd.device)
    remove(sd.unet)  # the trainer's edits, which are put back below
    optimiser, latents = trainer.configure_optimizers(), latents_of(sd, settings)
    templates = [TEMPLATES[i % len(TEMPLATES)] for i in range(settings.batch)]
    rows = {"latents": latents, "mask": latents[:, :1].sigmoid(), "template": templates}
    trainer.encode(TEMPLATES)

    def run(steps: int) -> Tensor:
        for step in range(steps):
            with autocast(sd, settings):
                loss = trainer.denoising_loss(rows, torch.Generator().manual_seed(step), {})
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        return loss.detach()

    before, sd.unet.checkpoint = sd.unet.checkpoint, checkpointing
    try:
        with edited(sd.unet, trainer.edits):
            yield run
    finally:
        sd.unet.checkpoint = before


@contextmanager
def load(sd: StableDiffusion, settings: Settings) -> Iterator[Run]:
    """Building the model from one file in half precision, which the system has just written and keeps in memory."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        checkpoint.save(file, {name: getattr(sd, name) for name in checkpoint.PREFIXES}, sd.architecture)
        options = {"device": settings.device, "dtype": DTYPES[settings.precision]}
        yield lambda steps: StableDiffusion.from_checkpoint(backbone(settings.size), file, **options)


def autocast(sd: StableDiffusion, settings: Settings) -> AbstractContextManager:
    """What the UNet is called within."""
    return sd.autocast("autocast") if settings.precision == "autocast" else nullcontext()


CASES: dict[str, Case] = {
    "guided_step_base": partial(guided_step, concepts=0),
    "guided_step_one_concept": partial(guided_step, concepts=1),
    "guided_step_eight_concepts": partial(guided_step, concepts=len(NOUNS)),
    "unet": unet,
    "unet_diffusers": partial(unet, diffusers=True),
    "train_step": train_step,
    "train_step_checkpointing": partial(train_step, checkpointing=True),
    "image_50_steps": image,
    "optimiser_10_steps": train_step,
    "load": load,
    "memory_guided_step": partial(guided_step, concepts=1),
    "memory_image": image,
    "memory_train_batch_1": partial(train_step, batch=1),
    "memory_train_batch_1_checkpointing": partial(train_step, batch=1, checkpointing=True),
    "memory_train_batch_4": partial(train_step, batch=4),
    "memory_train_batch_4_checkpointing": partial(train_step, batch=4, checkpointing=True),
}
STEPS = {"image_50_steps": 50, "optimiser_10_steps": 10}  # that are timed together; of the others one
