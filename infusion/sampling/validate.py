"""Checks what is asked for before anything is drawn; errors name the flag or file."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from infusion.sampling.prompts import Job
from infusion.sampling.settings import LONGEST
from infusion.tokens import PLACEHOLDER, fill, point, word_pattern
from ldm.util.cli import UserError, check_range, naming
from ldm.util.templates import foreign, foreign_warning

if TYPE_CHECKING:
    from torch import Tensor

    from infusion.concepts.concept import Concept
    from ldm.pipeline import StableDiffusion

logger = logging.getLogger(__name__)


def check_words(flags: argparse.Namespace, jobs: list[Job]) -> None:
    """Warns of foreign syntax; UserError for words that are too long, or that cannot be written in UTF-8."""
    texts = [(source(flags, job), job.prompt) for job in jobs]
    texts += [(source(flags, job, "negative_prompt"), job.settings.negative_prompt) for job in jobs]
    said = texts + [(f"--{name}", word) for name in ("target_word", "noun") for word in getattr(flags, name) or ()]
    for flag, text in said:
        if len(text) > LONGEST:
            raise UserError(f"{flag}: has {len(text):,} characters; at most {LONGEST:,} are read: {text[:20]!r} …")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{flag}: {text[:80]!r} is no text in UTF-8")
    if odd := foreign_warning(text for _, text in texts):
        logger.warning("warning: %s: %s", next(flag for flag, text in texts if foreign(text)), odd)


def fill_in(flags: argparse.Namespace, jobs: list[Job], concepts: "list[Concept]") -> list[str]:
    """Each job's prompt with a placeholder for every concept; concepts that act everywhere need none.

    Raises:
        UserError: no prompt has one, or one has a placeholder or a word of no concept.
    """
    from infusion.methods import acts_everywhere  # not above: it takes seconds

    for name in ("target_word", "noun"):
        given = getattr(flags, name)
        if given and len(given) != len(concepts):
            raise UserError(f"--{name}: {len(given)} for {len(concepts)} of --personalized_ckpt; give one for each")
    templates = [job.prompt for job in jobs]
    if flags.target_word:
        with naming("--target_word"):
            templates = [point(template, flags.target_word) for template in templates]
        for job, template in zip(jobs, templates, strict=True):
            if more := [word for word in flags.target_word if word_pattern(word).search(template)]:
                logger.info("%s: %r is there again; the concept is at {} in %r", source(flags, job), more[0], template)
    if concepts:
        for job, template in zip(jobs, templates, strict=True):
            with naming(source(flags, job)):
                fill(template, [concept.superclass for concept in concepts])
        without = [template for template in templates if not PLACEHOLDER.search(template)]
        first = repr(without[0][:80]) if without else ""
        everywhere = all(acts_everywhere(concept.method) for concept in concepts)
        if len(without) == len(templates) and not everywhere:
            raise UserError(f"--prompt: {first} has no {{}} for the concept; write it, or name its --target_word")
        if without and not everywhere:
            logger.warning("warning: the concept is not in %s, which has no {}", first)
    return templates


def source(flags: argparse.Namespace, job: Job, name: str = "prompt") -> str:
    """What a job's prompt, or its negative prompt, came by: a flag, or a line of a file."""
    return f"--from-file: {flags.from_file}: line {job.row}" if job.row else f"--{name}"


def check_texts(
    sd: "StableDiffusion",
    flags: argparse.Namespace,
    jobs: list[Job],
    templates: list[str],
    concepts: "list[Concept]",
    noun: Sequence[str] | None,
) -> None:
    """Raises UserError, which names the flag or line, for a text that this model cannot read whole."""
    from infusion.sampling.sample import check_prompts

    for job, template in zip(jobs, templates, strict=True):
        with naming(source(flags, job)):
            check_prompts(sd, [template], concepts, noun)
    for negative, job in {job.settings.negative_prompt: job for job in reversed(jobs)}.items():
        with naming(source(flags, job, "negative_prompt")):
            sd.text.tokenizer.windows([negative])


def check_concepts(sd: "StableDiffusion", files: "Mapping[str, Concept]", inverse: "Tensor | None") -> None:
    """Raises ValueError, which names the file, for a concept that this model has no place for."""
    from infusion.sampling.customised import Customised

    for file, concept in files.items():
        with naming(file), Customised(sd, [concept], inverse_covariance=inverse):
            pass


def check_sizes(sd: "StableDiffusion", jobs: list[Job]) -> None:
    """Raises UserError for what this model cannot draw, in any of the jobs."""
    chosen = [job.settings for job in jobs]
    for settings in {(own.height, own.width, own.steps): own for own in chosen}.values():
        for flag, size in (("height", (settings.height, None)), ("width", (None, settings.width))):
            try:
                sd.latent_shape(*size)
            except UserError as error:
                raise UserError(f"{error} (--{flag})") from error
        check_range("--steps", settings.steps, 1, sd.schedule.timesteps - 1)
