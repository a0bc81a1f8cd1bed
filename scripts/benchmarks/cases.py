"""The cases of the benchmark: each makes ready, which is not timed, and gives what is."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.amp import GradScaler

from data.prompts import TEMPLATES
from infusion.concepts.concept import Concept
from infusion.gate import Gate
from infusion.inject import cross_attention_layers, remove
from infusion.methods.infusion import Infusion
from infusion.sampling.customised import Customised
from infusion.sampling.settings import Settings as Sampling
from infusion.training.trainer import ConceptTrainer
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError
from ldm.util.config import BACKBONES
from ldm.weights.export import diffusers_tensors, unet_config

DTYPES = {"full": torch.float32, "autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of weights
NOUNS = ("cat", "dog", "hat", "car", "fish", "tree", "bird", "boat")
SCALE, TIMESTEP, STD = 7.5, 500, 0.02  # guidance; of single calls; of weights that a fresh model has as zeros
GATE = Gate(kind="hard")  # it reads no encodings, which have no values on the meta device
Run = Callable[[], Tensor]
Case = Callable[[StableDiffusion, "Settings"], AbstractContextManager[Run]]


@dataclass(frozen=True)
class Settings:
    """What everything is measured with: `latent` is the side of the latents, `steps` those of the image."""

    device: str
    size: str
    latent: int
    batch: int = 1
    precision: str = "full"
    steps: int = 50
    repeats: int = 5


def side_of_latents(size: str, wanted: int | None = None) -> int:
    """The side of training, where none is wanted; raises UserError for one that the UNet cannot halve."""
    with torch.device("meta"):
        sd = StableDiffusion.from_config(BACKBONES / f"{size}.yaml")
    side = wanted or sd.image_size // sd.vae.factor
    if side % sd.unet.factor:
        raise UserError(f"--latent: must be a multiple of {sd.unet.factor} for {size}, not {side}")
    return side


def build_model(settings: Settings) -> StableDiffusion:
    """A frozen model with random weights, the same on every call.

    A fresh UNet is zero where its residual branches end, so that it would predict zero and agree with anything.
    """
    torch.manual_seed(0)
    with torch.device(settings.device):
        sd = StableDiffusion.from_config(BACKBONES / f"{settings.size}.yaml")
    for parameter in sd.parameters():
        if not parameter.is_meta and not parameter.any():
            nn.init.normal_(parameter, std=STD)
    sd.cast(DTYPES[settings.precision])
    return sd.requires_grad_(False)


@contextmanager
def guided_step(sd: StableDiffusion, settings: Settings, concepts: int) -> Iterator[Run]:
    """One step of classifier-free guidance; gives the prediction (B, C, h, w)."""
    slots = [f"{{{i + 1}}}" for i in range(concepts)] or [NOUNS[0]]
    prompts = [f"a photo of a {', a '.join(slots)}"] * settings.batch
    latents, timestep = noise(sd, settings), torch.tensor(TIMESTEP, device=sd.device)
    with ExitStack() as stack, torch.no_grad(), autocast(sd, settings):
        if concepts:
            customised = Customised(sd, random_concepts(sd, concepts), Sampling(scale=SCALE))
            denoise = stack.enter_context(customised)(prompts)
        else:
            denoise = sd.guided(prompts, scale=SCALE)
        yield lambda: denoise(latents, timestep)


@contextmanager
def image(sd: StableDiffusion, settings: Settings) -> Iterator[Run]:
    """Guided images with a concept, from noise to pixels; gives (B, 3, H, W) in [0, 1]."""
    side, seeds = settings.latent * sd.vae.factor, range(settings.batch)
    with Customised(sd, random_concepts(sd, 1), Sampling(scale=SCALE)) as customised, autocast(sd, settings):
        denoise = customised(["a photo of a {}"] * settings.batch)
        yield lambda: sd.decode(sd.draw_latents(denoise, seeds, settings.steps, height=side, width=side))


@contextmanager
def unet(sd: StableDiffusion, settings: Settings, diffusers: bool = False) -> Iterator[Run]:
    """One call of the UNet without guidance, or of diffusers' with the same weights; gives (B, C, h, w)."""
    latents = noise(sd, settings).to(sd.dtype)
    timesteps = torch.full((settings.batch,), TIMESTEP, device=sd.device)
    if diffusers:
        with torch.device("meta"):  # holds no second copy while the weights are on their way
            peer = UNet2DConditionModel.from_config(unet_config(sd.unet, settings.latent))
        peer.load_state_dict(diffusers_tensors(sd.unet, sd.dtype), assign=True)
        peer = peer.eval().to(sd.device)
    with torch.no_grad(), autocast(sd, settings):
        context = sd.text.context(sd.text.tokenizer(["a photo of a cat"] * settings.batch)).to(sd.device, sd.dtype)
        side = settings.latent * sd.vae.factor
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * settings.batch, device=sd.device)
        added = None if context.pooled is None else {"text_embeds": context.pooled, "time_ids": sizes.float()}
        if diffusers:
            yield lambda: peer(latents, timesteps, context.text, added_cond_kwargs=added, return_dict=False)[0]
        else:
            yield lambda: sd.unet(latents, timesteps, context)


@contextmanager
def train_step(
    sd: StableDiffusion, settings: Settings, checkpointing: bool = False, scaler: GradScaler | None = None
) -> Iterator[Run]:
    """An optimiser step of Infusion on cached latents and cached text; gives the loss before it."""
    trainer = ConceptTrainer(sd, Infusion(), NOUNS[0], TEMPLATES, GATE).to(sd.device)
    scaler = scaler or GradScaler(sd.device.type, enabled=False)
    optimiser, latents = trainer.configure_optimizers(), noise(sd, settings)
    rows = {"latents": latents, "mask": latents[:, :1].sigmoid(), "template": [TEMPLATES[0]] * settings.batch}
    trainer.encode(TEMPLATES[:1])

    def run() -> Tensor:
        with autocast(sd, settings):
            loss = trainer.denoising_loss(rows, torch.Generator().manual_seed(0), {})
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        return loss.detach()

    sd.unet.checkpoint = checkpointing
    try:
        yield run
    finally:
        sd.unet.checkpoint = False
        remove(sd.unet)


CASES: dict[str, Case] = {
    "guided_step_base": partial(guided_step, concepts=0),
    "guided_step_one_concept": partial(guided_step, concepts=1),
    "guided_step_eight_concepts": partial(guided_step, concepts=len(NOUNS)),
    "unet": unet,
    "unet_diffusers": partial(unet, diffusers=True),
    "train_step": train_step,
    "train_step_checkpointing": partial(train_step, checkpointing=True),
    "image": image,
}
RATIOS = {  # name -> the case whose time is divided, and the one that it is divided by
    "guided_step_with_concept_vs_base": ("guided_step_one_concept", "guided_step_base"),
    "guided_step_with_8_concepts_vs_one": ("guided_step_eight_concepts", "guided_step_one_concept"),
    "unet_vs_diffusers": ("unet", "unet_diffusers"),
    "train_step_with_checkpointing_vs_without": ("train_step_checkpointing", "train_step"),
}


def noise(sd: StableDiffusion, settings: Settings) -> Tensor:
    """Standard normal latents (B, C, h, w), float32, the same on every call."""
    shape = (settings.batch, sd.vae.embed_dim, settings.latent, settings.latent)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(sd.device)


def random_concepts(sd: StableDiffusion, number: int) -> list[Concept]:
    """Infusion's concepts with random residuals, each of another superclass."""
    generator = torch.Generator().manual_seed(0)
    widths = {name: layer.heads * layer.dim_head for name, layer in cross_attention_layers(sd.unet).items()}
    concepts = []
    for noun in NOUNS[:number]:
        residuals = {name: 0.1 * torch.randn(width, generator=generator) for name, width in widths.items()}
        concepts.append(Concept(residuals, noun, ("a photo of a {}",), sd.architecture, sd.hash, gate=GATE))
    return concepts


def autocast(sd: StableDiffusion, settings: Settings) -> AbstractContextManager:
    return sd.autocast("autocast") if settings.precision == "autocast" else nullcontext()
