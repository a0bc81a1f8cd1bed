"""Images of prompts with or without concepts: the one way to draw with them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from infusion.concepts.concept import Concept
from infusion.sampling.customised import Customised, nouns_of
from infusion.sampling.settings import Settings
from infusion.tokens import PLACEHOLDER, concept_places
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError

OF_THE_BASE = ("steps", "scale", "negative_prompt", "eta", "sampler", "height", "width", "precision")  # settings


def check_prompts(
    sd: StableDiffusion,
    prompts: Sequence[str],
    concepts: Sequence[Concept] = (),
    noun: str | Sequence[str] | None = None,
) -> None:
    """Raises ValueError for a prompt that cannot be drawn whole with these concepts; `noun`: see `Settings`."""
    for prompt in prompts:
        if concepts:
            concept_places(sd.text.tokenizer, prompt, nouns_of(concepts, noun), whole=True)
            continue
        sd.text.tokenizer.windows([prompt])
        if found := PLACEHOLDER.search(prompt):
            raise UserError(f"there is no concept for {found[0]} in the prompt {prompt!r}")


def sample(
    sd: StableDiffusion,
    prompts: Sequence[str],
    concepts: Sequence[Concept] = (),
    settings: Settings | None = None,
    *,
    seed: int | Sequence[int] = 0,
    inverse_covariance: Tensor | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    **choices: Any,
) -> Tensor:
    """One image per prompt; an image depends on its own prompt and seed alone.

        images = infusion.sample(sd, ["a photo of a {}"] * 4, [concept], steps=50, strength=0.8)

    Args:
        sd: the base model.
        prompts: B strings; `{}` is the concept (`{1}`, `{2}`, … several) and reads as its superclass word.
        concepts: what to customise the model with, in the order of `{1}`, `{2}`, …; none is the base model.
        settings: how to draw; None is `Settings()`.
        seed: of the first image, where image `i` has `seed + i`; or B seeds, one for each.
        inverse_covariance: C⁻¹, (D, D), when the concepts were trained with one; None is the identity.
        batch_size: images at a time; None is all of them.
        progress: show a progress bar.
        choices: fields of `Settings` by name, which go before those of `settings`.

    Returns:
        (B, 3, H, W) float32 in [0, 1], on the model's device.

    Raises:
        ValueError: a setting is out of range, a prompt has a `{}` and there is no concept for it, or the concepts do
            not fit the model (`Customised`).
    """
    settings = replace(settings or Settings(), **choices)
    check_prompts(sd, prompts, concepts, settings.noun)
    check_prompts(sd, [settings.negative_prompt])
    how = {name: getattr(settings, name) for name in OF_THE_BASE}
    how |= {"seed": seed, "batch_size": batch_size, "progress": progress}
    if not concepts:
        return sd.sample(prompts, **how)
    with Customised(sd, concepts, settings, inverse_covariance) as customised:
        return sd.sample(prompts, customised, **how)
