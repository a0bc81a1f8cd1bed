"""Images of prompts with or without concepts, from one seed each: what the commands draw with."""

from collections.abc import Sequence

from torch import Tensor

from infusion.concepts.concept import Concept
from infusion.sampling.settings import Settings
from infusion.tokens import PLACEHOLDER, concept_masks
from ldm.pipeline import StableDiffusion


def check_prompts(
    sd: StableDiffusion,
    prompts: Sequence[str],
    concepts: Sequence[Concept] = (),
    nouns: Sequence[str] | None = None,
) -> None:
    """Raises ValueError for a prompt that cannot be drawn with these concepts; `nouns`: see `Settings.replace_word`."""
    for prompt in prompts:
        if concepts:
            concept_masks(sd.text.tokenizer, prompt, nouns or [concept.noun for concept in concepts])
        elif found := PLACEHOLDER.search(prompt):
            raise ValueError(f"there is no concept for {found[0]} in the prompt {prompt!r}")


def generate(
    sd: StableDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    concepts: Sequence[Concept] = (),
    settings: Settings | None = None,
    map_grid: tuple[int, int] | None = None,
    progress: bool = False,
    inverse_covariance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One image per prompt and seed; an image depends on neither the others nor its place among them.

    Args:
        prompts, seeds: B of each; with concepts, `{}` in a prompt is the concept.
        map_grid: (rows, columns) of the concepts' attention maps; None collects none.
        inverse_covariance: C^-1, (D, D), when the concepts were trained with one.

    Returns:
        Images (B, 3, H, W) float32 in [0, 1], and attention maps (B, K, rows, columns) or None.

    Raises:
        ValueError: whatever `check_prompts`, `Customised` and `ldm.diffusion.sampler.sample` refuse.
    """
    settings = Settings() if settings is None else settings
    check_prompts(sd, prompts, concepts, settings.replace_word)
    options = {}
    if concepts:
        options = {"beta": settings.beta, "tau": settings.tau, "strengths": settings.strength, "gate": settings.gate}
        options |= {"nouns": settings.replace_word, "regions": settings.region}
        options |= {"inverse_covariance": inverse_covariance, "map_grid": map_grid}
    # text and gates in the model's own precision, whatever the UNet's
    context = sd.denoiser(list(prompts), concepts, settings.negative_prompt, settings.scale, **options)
    how = (settings.steps, settings.ddim_eta, settings.sampler, settings.H, settings.W, progress)
    with context as denoise, sd.autocast(settings.precision):
        images = sd.decode(sd.draw_latents(denoise, seeds, *how))
    return images, denoise.attention_maps if options and map_grid else None
