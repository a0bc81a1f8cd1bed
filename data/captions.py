"""Captions of photos: files with one a line, which become training prompts with {} for the concept."""

import re
from pathlib import Path

from ldm.models.tokenizer import Tokenizer
from ldm.util.cli import UserError
from ldm.util.files import read_text
from ldm.util.templates import fill, foreign_warning, short

LARGEST = 100_000  # bytes of a photo's captions, at most
BEFORE = "{}, "  # a caption without the noun


def read_captions(path: Path, superclass: str) -> tuple[list[str], list[str]]:
    """The lines of a caption file with the superclass turned into `{}`, and those that name it nowhere.

    The latter get `{}, ` before them: "on grass" becomes "{}, on grass". Both are [] when there is no such file.
    """
    if not path.is_file():
        return [], []
    words = r"\s+".join(map(re.escape, superclass.split()))
    noun = re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)
    templates, without = [], []
    for line in filter(None, map(str.strip, read_text(path, LARGEST).splitlines())):
        template = line if "{}" in line else noun.sub("{}", line)
        if "{}" not in template:
            without.append(line)
            template = BEFORE + line
        templates.append(template)
    return templates, without


def check_captions(captions: dict[str, list[str]], noun: str, tokenizer: Tokenizer) -> list[str]:
    """Lines about captions that training does not read as they stand, to be shown as warnings.

    Args:
        captions: file -> its templates.
        noun: what {} reads as.

    Raises:
        UserError: the concept lies beyond what training reads of a caption; the message has file and lost part.
    """
    read, lost = tokenizer.context_length - 2, []
    for file, templates in captions.items():
        for template in templates:
            prompt = fill(template, [noun])
            if not (beyond := tokenizer.beyond(prompt)):
                continue
            if len(tokenizer.encode(template.partition("{}")[0])) >= read:
                raise UserError(
                    f"{file}: the concept lies beyond the {read} tokens that training reads of the caption "
                    f"{short(prompt)}: move {noun!r} forward, or shorten the caption by {short(beyond)}"
                )
            lost.append(f"{file}: {short(beyond)}")
    warnings = []
    if lost:
        many = f"{len(lost)} captions have more than the {read} tokens that training reads"
        warnings.append(f"{many}; lost: {_few(lost)}")
    if odd := foreign_warning(template for templates in captions.values() for template in templates):
        warnings.append(f"captions: {odd}")
    return warnings


def without_noun(lines: dict[str, list[str]], superclass: str) -> str:
    """One line about captions that do not name the concept, by their files; "" where all do."""
    found = [f"{file}: {short(line)}" for file, own in lines.items() for line in own]
    if not found:
        return ""
    return f"{len(found)} captions name no {superclass!r} and get `{BEFORE}` before them: {_few(found)}"


def _few(items: list[str]) -> str:
    return "; ".join(items[:3]) + ("; …" if len(items) > 3 else "")
