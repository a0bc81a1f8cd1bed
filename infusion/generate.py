"""Images of prompts with or without concepts, from one seed each: what the commands draw with."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from infusion.concept import Concept
from infusion.regions import Region
from infusion.sampling import BETA, TAU
from infusion.tokens import PLACEHOLDER, concept_masks
from ldm.pipeline import StableDiffusion


@dataclass(frozen=True)
class Settings:
    """How to sample; the names are those of the flags of `scripts/infusion_txt2img.py`.

    Attributes:
        steps: sampling steps. scale: classifier-free guidance, 1 is none. sampler: a key of `ldm.schedule.SAMPLERS`.
        ddim_eta: share of DDIM's noise, in [0, 1].
        negative_prompt: what to guide away from.
        H, W: pixels; None is the size of training.
        beta, tau, strength: one value, or one for each concept.
        gate: kind of gate, one or one for each concept; None is what each was trained with.
        replace_word: what stands in the prompts for each concept; None is what each was trained with.
        region: boxes that concepts keep to.
        precision: "full" is the model's own; "autocast" runs the UNet in half precision (`StableDiffusion.autocast`).
    """

    steps: int = 50
    scale: float = 7.5
    sampler: str = "ddim"
    ddim_eta: float = 0.0
    negative_prompt: str = ""
    H: int | None = None
    W: int | None = None
    beta: float | Sequence[float] = BETA
    tau: float | Sequence[float] = TAU
    strength: float | Sequence[float] = 1.0
    gate: str | Sequence[str] | None = None
    replace_word: Sequence[str] | None = None
    region: Sequence[Region] = ()
    precision: str = "full"


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
        ValueError: whatever `check_prompts`, `Customised` and `ldm.sampler.sample` refuse.
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
        images = sd.draw(denoise, seeds, *how)
    return images, denoise.attention_maps if options and map_grid else None
