"""Pictures that something else has drawn, with their prompts."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.dataset import over_white, read_image, to_square
from data.photos import is_image
from ldm.util.cli import UserError, naming
from ldm.util.config import find
from ldm.util.files import read_text


@dataclass(frozen=True)
class PromptedPictures:
    """Pictures of a folder in natural order (2.png before 10.png), cropped about their centre and resized to squares.

    Attributes:
        images: (N, 3, S, S) float32 in [0, 1].
        prompts: picture i has the i-th, going round.
        rule: which prompt belongs to which picture, in words.
    """

    images: Tensor
    prompts: tuple[str, ...]
    rule: str


def read_pictures(folder: str | Path, size: int, prompts: str | Path | None = None) -> PromptedPictures:
    """The pictures of a folder.

    Args:
        size: S, of the squares: the largest centred square of a picture, by Lanczos resampling.
        prompts: a file with a prompt a line. Picture i belongs to line i, and after the last line to the first again,
            so there are as many pictures as lines, or a multiple of that. None: `<stem>.txt` beside a picture holds its
            prompt, or the PNG's own text "prompt".

    Raises:
        UserError: no such folder or file, fewer than 2 pictures, one that cannot be read, a count that does not fit the
            prompts, or a picture without a prompt.
    """
    paths = picture_files(folder)
    images = [to_square(over_white(read_image(path)), size) / 255 for path in paths]
    if prompts is None:
        said = [prompt_of(path) for path in paths]
        rule = "each has its own, in <stem>.txt or in the PNG"
    else:
        said = lines_of(prompts)
        if len(paths) % len(said):
            raise UserError(
                f"--pictures: {folder} has {len(paths)} pictures for {len(said)} prompts of {prompts}: picture i is of "
                "prompt i, going round, so as many or a multiple are wanted; or leave --prompts out, and give each "
                "picture its own in <stem>.txt"
            )
        rule = f"picture i in natural order has line i of {Path(prompts).name}, going round"
    return PromptedPictures(torch.stack(images), tuple(said), rule)


def picture_files(folder: str | Path) -> list[Path]:
    """Image files of a folder in natural order; raises UserError for fewer than 2."""
    root = find(folder)
    if not root.is_dir():
        raise UserError(f"--pictures: there is no folder {folder}")
    paths = sorted((path for path in root.iterdir() if is_image(path)), key=natural)
    if len(paths) < 2:
        raise UserError(f"--pictures: {folder} has {len(paths)} pictures, too few to measure")
    return paths


def natural(path: Path) -> list[int | str]:
    """What names are sorted by so that 2 comes before 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", path.name))]


def lines_of(file: str | Path) -> list[str]:
    """The prompts of a file, one a line; raises UserError for none."""
    with naming("--prompts"):
        lines = [line.strip() for line in read_text(find(file)).splitlines()]
    if not (found := [line for line in lines if line]):
        raise UserError(f"--prompts: {file} holds no prompt")
    return found


def prompt_of(path: Path) -> str:
    """The prompt that lies beside a picture or stands in it; raises UserError where there is none."""
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return lines_of(beside)[0]
    with Image.open(path) as image:
        said = image.info.get("prompt")
    if not isinstance(said, str) or not said.strip():
        raise UserError(f"--pictures: {path} has no prompt: give one in {beside.name}, or name a file by --prompts")
    return said.strip()
