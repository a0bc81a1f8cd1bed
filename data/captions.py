"""Captions of photos: files with one a line, which become training prompts with {} for the concept."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.photos import PhotoFolder
from ldm.models.tokenizer import Tokenizer
from ldm.util.cli import UserError
from ldm.util.files import numbered_lines, read_text
from ldm.util.templates import fill, foreign, foreign_warning, short

LARGEST = 100_000  # bytes of a photo's captions, at most
BEFORE = "{}, "  # a caption without the noun


@dataclass(frozen=True)
class Caption:
    """A line of a caption file.

    Attributes:
        path, line: the file, and the number of the line in it, from 1.
        template: what it says, with {} for the concept.
        named: whether it says where the concept is; else `template` begins with `BEFORE`.
    """

    path: Path
    line: int
    template: str
    named: bool = True

    @property
    def place(self) -> str:
        """Of the file and line, such as photos/3.txt:2."""
        return f"{self.path}:{self.line}"


def read_captions(path: Path, superclass: str) -> list[Caption]:
    """The lines of a caption file that are not empty, with the superclass turned into `{}`.

    One that names it nowhere gets `{}, ` before it: "on grass" becomes "{}, on grass".

    Raises:
        UserError: the file cannot be read, or a caption has other braces than {}.
    """
    words = r"\s+".join(map(re.escape, superclass.split()))
    noun = re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)
    captions = []
    for number, line in numbered_lines(read_text(path, LARGEST)):
        if set("{}") & set(line.replace("{}", "")):
            raise UserError(f"{path}:{number}: {short(line)} has other braces than {{}}, which is the concept")
        template = line if "{}" in line else noun.sub("{}", line)
        named = "{}" in template
        captions.append(Caption(path, number, template if named else BEFORE + template, named))
    return captions


def captions_of(folder: PhotoFolder, superclass: str) -> list[list[Caption]]:
    """The captions of each photo; [] where it has none. Errors as of `read_captions`."""
    return [[] if photo.caption is None else read_captions(photo.caption, superclass) for photo in folder.photos]


def caption_warnings(captions: Sequence[Caption], superclass: str, noun: str, tokenizer: Tokenizer) -> list[str]:
    """A line for each kind of caption that training does not read as it stands: file and line, and what is lost.

    Args:
        superclass: what names the concept in captions.
        noun: what {} reads as in training.
    """
    beyond = {caption: tokenizer.beyond(fill(caption.template, [noun])) for caption in captions}
    unnamed = [f"{c.place}: {short(c.template.removeprefix(BEFORE))}" for c in captions if not c.named]
    lost = [f"{caption.place}: {short(part)}" for caption, part in beyond.items() if part]
    odd = [caption for caption in captions if foreign(caption.template)]
    found = []
    if unnamed:
        found.append(f"{len(unnamed)} captions name no {superclass!r} and get `{BEFORE}` before them: {_few(unnamed)}")
    if lost:
        read = f"the {tokenizer.context_length - 2} tokens that training reads"
        found.append(f"{len(lost)} captions have more than {read}; lost: {_few(lost)}")
    if odd:
        places = _few([caption.place for caption in odd])
        found.append(f"{places}: {foreign_warning(caption.template for caption in odd)}")
    return found


def _few(items: list[str]) -> str:
    return "; ".join(items[:3]) + ("; …" if len(items) > 3 else "")
