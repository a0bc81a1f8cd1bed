"""Prompt files: a prompt a line, with options of its own behind it as sd-scripts has them.

a photo of a {} on grass
a cartoon of a {} at night --n blurry --w 512 --h 768 --s 30 --d 7 --l 6
# a line that is passed over
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from infusion.sampling.settings import Settings
from ldm.util.cli import UserError, count, number, seed
from ldm.util.files import numbered_lines

OPTIONS: dict[str, tuple[str, Callable[[str], object]]] = {  # letter -> setting, and how it is read
    "n": ("negative_prompt", str),
    "w": ("width", count),
    "h": ("height", count),
    "s": ("steps", count),
    "l": ("scale", number),
    "d": ("seed", seed),
}


PROMPTS = 10_000  # of a file, at most


@dataclass(frozen=True)
class Job:
    """A prompt and how to draw it.

    Attributes:
        seed: of its first image, None where the line does not say.
        row: number of its line in a file.
    """

    prompt: str
    settings: Settings
    seed: int | None = None
    row: int | None = None


def read_jobs(text: str, settings: Settings) -> list[Job]:
    """The prompts of a file's text, in order; what a line does not say is as in `settings`.

    Raises:
        ValueError: no prompt, or too many; an unknown option, or one with a wrong value: the message names the line.
    """
    jobs = [read_line(line, row, settings) for row, line in numbered_lines(text) if not line.startswith("#")]
    if not jobs:
        raise UserError("has no prompt in it")
    if len(jobs) > PROMPTS:
        raise UserError(f"has {len(jobs):,} prompts; at most {PROMPTS:,} are taken: make several files of it")
    return jobs


def read_line(line: str, row: int, settings: Settings) -> Job:
    """One line; raises ValueError as `read_jobs` does."""
    prompt, *options = re.split(r"(?:^|\s)--(?=[A-Za-z])", line)
    if not prompt.strip():
        raise UserError(f"line {row}: has options and no prompt")
    chosen: dict[str, object] = {}
    for option in options:
        letter, _, value = option.partition(" ")
        if letter not in OPTIONS:
            raise UserError(f"line {row}: there is no option --{letter[:20]}; there are --{', --'.join(OPTIONS)}")
        name, convert = OPTIONS[letter]
        try:
            chosen[name] = convert(value.strip())
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"line {row}: --{letter}: {str(error)[:100]}") from error
    first = chosen.pop("seed", None)
    try:
        return Job(prompt.strip(), replace(settings, **chosen), first, row)
    except UserError as error:
        raise UserError(f"line {row}: {error}") from error
