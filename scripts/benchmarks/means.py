"""Means of saving time, each beside the same work without it; docs/performance.md says which are kept, and why."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from infusion.attention import CustomisedPass, EditedCrossAttention, FoundationPass, Tape
from infusion.inject import cross_attention_layers
from infusion.sampling import settings as sampling
from infusion.sampling.customised import Customised
from ldm.pipeline import StableDiffusion
from scripts.benchmarks.cases import SCALE, guided_step, train_step
from scripts.benchmarks.inputs import NOUNS, TIMESTEP, drawn, random_concepts
from scripts.benchmarks.model import autocast
from scripts.benchmarks.settings import SAMPLING_MEANS, TRAINING_MEANS, Settings
from scripts.benchmarks.timing import Case


def sampling_means(sd: StableDiffusion, settings: Settings) -> list[Case]:
    """A guided step with one concept as it is, and with one thing done otherwise."""
    name, two_calls, channels_last, kept = SAMPLING_MEANS
    usual = guided_step(sd, settings, name, 1)
    return [
        usual,
        in_two_calls(sd, settings, two_calls),
        within(usual, channels_last, lambda: in_channels_last(sd.unet)),
        within(usual, kept, lambda: keys_and_values_kept(sd), before=1),
    ]


def training_means(sd: StableDiffusion, settings: Settings) -> list[Case]:
    """An optimiser step as it is, and with one thing done otherwise."""
    name, encoding, checkpointing, ending, fused = TRAINING_MEANS
    usual = train_step(sd, settings, name)
    return [
        usual,
        encoding_each_step(sd, settings, usual, encoding),
        train_step(sd, settings, checkpointing, checkpointing=True),
        within(usual, ending, lambda: foundation_ends_early(sd)),
        train_step(sd, settings, fused, fused=True),
    ]


def within(case: Case, name: str, change: Callable[[], AbstractContextManager[None]], before: int = 0) -> Case:
    """A case while something about the model is changed, timed after so many steps of it."""

    @contextmanager
    def ready() -> Iterator[Callable[[int], object]]:
        with case.ready() as run, change():
            if before:
                run(before)
            yield run

    return Case(name, ready, case.steps)


def in_two_calls(sd: StableDiffusion, settings: Settings, name: str) -> Case:
    """The guided step as a foundation pass of two rows an image, and a customised pass of the third."""
    customised = Customised(sd, random_concepts(sd, 1), sampling.Settings(scale=SCALE))
    denoiser = customised(["a photo of a {}"] * settings.batch)
    latents = drawn(settings.batch, sd, settings)
    timesteps, batch = torch.full((2 * settings.batch,), TIMESTEP, device=latents.device), settings.batch

    def step() -> Tensor:
        tape: Tape = {}
        inputs = latents.to(denoiser.text.dtype).repeat(2, 1, 1, 1)
        foundation = sd.unet(inputs, timesteps, FoundationPass(denoiser.text, denoiser.gates, tape))
        ours = {layer: (out[batch:], mass[batch:]) for layer, (out, mass) in tape.items()}
        context = CustomisedPass(denoiser.text[batch:], ours, customised.strengths)
        conditional = sd.unet(inputs[batch:], timesteps[batch:], context)
        unconditional = foundation[:batch]
        return unconditional + SCALE * (conditional - unconditional)

    @contextmanager
    def ready() -> Iterator[Callable[[int], Tensor]]:
        with customised, torch.no_grad(), autocast(sd, settings):
            yield lambda steps: [step() for _ in range(steps)][-1]

    return Case(name, ready)


@contextmanager
def in_channels_last(unet: nn.Module) -> Iterator[None]:
    """Convolutions' weights, and with them the feature maps, with the channels as the innermost dimension."""
    unet.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        unet.to(memory_format=torch.contiguous_format)


class Kept(nn.Module):
    """A projection that is computed once: whatever it is given later, it gives the first result."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        self.result: Tensor | None = None

    def forward(self, text: Tensor) -> Tensor:
        if self.result is None:
            self.result = self.projection(text)
        return self.result


@contextmanager
def keys_and_values_kept(sd: StableDiffusion) -> Iterator[None]:
    """Cross-attention layers that compute the text's keys and values at their first call alone."""
    layers = list(cross_attention_layers(sd.unet).values())
    usual = [(layer.to_k, layer.to_v) for layer in layers]
    for layer in layers:
        layer.to_k, layer.to_v = Kept(layer.to_k), Kept(layer.to_v)
    try:
        yield
    finally:
        for layer, (to_k, to_v) in zip(layers, usual, strict=True):
            layer.to_k, layer.to_v = to_k, to_v


def encoding_each_step(sd: StableDiffusion, settings: Settings, usual: Case, name: str) -> Case:
    """The optimiser step behind an encoding of its images and prompts, whose result is thrown away."""
    side = settings.latent * sd.vae.factor
    images = torch.rand(settings.batch, 3, side, side, device=sd.device) * 2 - 1
    prompts = [f"a photo of a {NOUNS[0]}"] * settings.batch

    @contextmanager
    def ready() -> Iterator[Callable[[int], object]]:
        with usual.ready() as run:

            def encode_and_run(steps: int) -> object:
                for _ in range(steps):
                    with torch.no_grad(), autocast(sd, settings):
                        sd.vae.encode(images)
                        sd.text(prompts)
                    loss = run(1)
                return loss

            yield encode_and_run

    return Case(name, ready)


class Ended(Exception):
    """The foundation pass has filled its tape."""


@contextmanager
def foundation_ends_early(sd: StableDiffusion) -> Iterator[None]:
    """Foundation passes end behind the attention of their last edited layer; what they would return is not used."""
    last = [module for module in sd.unet.modules() if isinstance(module, EditedCrossAttention)][-1]

    def stop(module: nn.Module, inputs: tuple, out: Tensor) -> None:
        if isinstance(inputs[1], FoundationPass):
            raise Ended

    forward = sd.unet.forward

    def until_ended(*arguments: object) -> Tensor | None:
        try:
            return forward(*arguments)
        except Ended:
            return None

    with ExitStack() as stack:
        stack.callback(last.register_forward_hook(stop).remove)
        sd.unet.forward = until_ended
        stack.callback(lambda: delattr(sd.unet, "forward"))
        yield
