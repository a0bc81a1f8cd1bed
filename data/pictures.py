"""Pictures that something else has drawn, with their prompts."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.crop import to_square
from data.images import over_white, read_image, text_of
from data.photos import Photo, PhotoFolder
from ldm.util.cli import UserError, naming
from ldm.util.config import find
from ldm.util.files import numbered_lines, read_text


@dataclass(frozen=True)
class PromptedPictures:
    """Pictures of a folder in natural order (2.png before 10.png), cropped about their centre and resized to squares.

    Attributes:
        images: (N, 3, S, S) float32 in [0, 1].
        prompts: picture i has the i-th, going round.
        rule: which prompt belongs to which picture, in words.
        folder: what it holds.
    """

    images: Tensor
    prompts: tuple[str, ...]
    rule: str
    folder: PhotoFolder


def read_pictures(folder: str | Path, size: int, prompts: str | Path | None = None) -> PromptedPictures:
    """The pictures of a folder.

    Args:
        size: S, of the squares: the largest centred square of a picture, by Lanczos resampling.
        prompts: a file with a prompt a line. Picture i belongs to line i, and after the last line to the first again,
            so there are as many pictures as lines, or a multiple of that. None: `<stem>.txt` or `<stem>.caption` beside
            a picture holds its prompt, or the PNG's own text "prompt".

    Raises:
        UserError: as `PhotoFolder.read`; fewer than 2 pictures, one that cannot be read, a count that does not fit the
            prompts, or a picture without a prompt.
    """
    found = PhotoFolder.read(folder, "--pictures")
    pictures = sorted(found.photos, key=lambda photo: natural(photo.path))
    if len(pictures) < 2:
        raise UserError(f"--pictures: {folder} has 1 picture, too few to measure")
    images = [to_square(over_white(read_image(photo.path)), size) / 255 for photo in pictures]
    if prompts is None:
        said = [prompt_of(photo) for photo in pictures]
        rule = "each has its own, in the file beside it or in the PNG"
    else:
        said = lines_of(prompts)
        if len(pictures) % len(said):
            raise UserError(
                f"--pictures: {folder} has {len(pictures)} pictures for {len(said)} prompts of {prompts}: picture i is "
                "of prompt i, going round, so as many or a multiple are wanted; or leave --prompts out, and give each "
                "picture its own in <stem>.txt"
            )
        rule = f"picture i in natural order has line i of {Path(prompts).name}, going round"
    return PromptedPictures(torch.stack(images), tuple(said), rule, found)


def natural(path: Path) -> list[int | str]:
    """What names are sorted by so that 2 comes before 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", path.name))]


def lines_of(file: str | Path) -> list[str]:
    """The prompts of a file, one a line; raises UserError for none."""
    with naming("--prompts"):
        found = [line for _, line in numbered_lines(read_text(find(file)))]
    if not found:
        raise UserError(f"--prompts: {file} holds no prompt")
    return found


def prompt_of(picture: Photo) -> str:
    """The prompt that lies beside a picture or stands in it; raises UserError where there is none, or are several."""
    if picture.caption is not None:
        lines = lines_of(picture.caption)
        if len(lines) > 1:
            raise UserError(f"--pictures: {picture.caption} has {len(lines)} lines: a picture has one prompt")
        return lines[0]
    said = text_of(picture.path).get("prompt", "").strip()
    if not said:
        name = f"{picture.path.stem}.txt"
        raise UserError(f"--pictures: {picture.path} has no prompt: give one in {name}, or name a file by --prompts")
    return said
