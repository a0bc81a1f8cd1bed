"""Pictures on disk: numbered PNGs that say how they were made, grids with captions, heat maps."""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor
from torchvision.utils import make_grid

from ldm.util.cli import UserError
from ldm.util.files import create

HEAT = "inferno"  # matplotlib's name of the heat maps' colours
PAPER, INK = "white", "#333333"
SIDE = 256  # pixels of a picture in a report, at most
NAME = 24  # characters in a line of a row's name


def shrunk(images: Tensor, side: int = SIDE) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] whose longer side is at most so many pixels; smaller ones as they are."""
    size = max(images.shape[2:])
    if size <= side:
        return images
    return F.interpolate(images, scale_factor=side / size, mode="bicubic", antialias=True).clamp(0, 1)


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> an RGB picture; raises ValueError for numbers that are not finite."""
    if not image.isfinite().all():
        raise UserError("a picture has numbers that are not finite: use --precision full, or a lower --scale")
    return Image.fromarray(image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


def png(image: Tensor | Image.Image, text: Mapping[str, object] | None = None) -> bytes:
    """A PNG file of a picture or of (3, H, W) in [0, 1], with one text chunk for each item."""
    image = to_image(image) if isinstance(image, Tensor) else image
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, str(value))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info, optimize=True)
    return file.getvalue()


class Numbered:
    """Files `<folder>/<prefix>00000.png` …: numbering continues after those that are there; none is overwritten.

    Args:
        folder: made when the first file is written.
        prefix: of the names. digits: of the numbers.
    """

    def __init__(self, folder: str | Path, prefix: str = "", digits: int = 5) -> None:
        self.folder, self.prefix, self.digits = Path(folder), prefix, digits
        pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.png")
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        self.next = max((int(found[1]) + 1 for found in map(pattern.fullmatch, names) if found), default=0)

    def write(self, content: bytes) -> Path:
        """Write the next file and return its path."""
        while True:
            path = self.folder / f"{self.prefix}{self.next:0{self.digits}d}.png"
            self.next += 1
            try:
                create(path, content)
                return path
            except FileExistsError:  # of another run at the same time
                continue


def grid(images: Sequence[Tensor] | Tensor, columns: int) -> Tensor:
    """Images (3, H, W) side by side, `columns` in a row -> (3, H', W')."""
    return make_grid(list(images), columns, pad_value=1.0)


def captioned_grid(
    rows: Mapping[str, Sequence[Tensor | None]],
    captions: Sequence[str],
    above: Mapping[str, Sequence[Tensor]] | None = None,
    side: int = 128,
    gap: int = 6,
) -> Image.Image:
    """Rows of images, each named on its left, under one line of captions.

    Args:
        rows: name of the row -> its images (3, H, W) in [0, 1], one for each caption; None leaves a place empty.
        captions: one for each column.
        above: rows that the captions do not speak of, of any length up to that of the others.
        side: pixels of each image's side in the picture.
    """
    above = {} if above is None else above
    font = ImageFont.load_default(13)
    wrapped = ["\n".join(textwrap.wrap(caption, max(side // 7, 1))) for caption in captions]
    names = {name: "\n".join(textwrap.wrap(name, NAME)) for name in (*rows, *above)}
    margin = 8 + max(int(font.getlength(line)) for name in names.values() for line in name.split("\n")) + 2 * gap
    head = 16 * max(caption.count("\n") + 1 for caption in wrapped) + 2 * gap
    height = head + (len(rows) + len(above)) * (side + gap) + gap
    sheet = Image.new("RGB", (margin + len(captions) * (side + gap), height), PAPER)
    draw = ImageDraw.Draw(sheet)

    def paste(y: int, name: str, images: Sequence[Tensor | None]) -> int:
        draw.multiline_text((8, y + side // 2), names[name], INK, font, anchor="lm")
        for column, image in enumerate(images[: len(captions)]):
            if image is None:
                continue
            picture = to_image(image).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(picture, (margin + column * (side + gap), y))
        return y + side + gap

    y = gap
    for name, images in above.items():
        y = paste(y, name, images)
    y += head
    for column, caption in enumerate(wrapped):
        middle = margin + column * (side + gap) + side // 2
        draw.multiline_text((middle, y - gap), caption, INK, font, anchor="md", align="center")
    for name, images in rows.items():
        y = paste(y, name, images)
    return sheet


def heat(image: Tensor, attention: Tensor) -> Tensor:
    """An attention map as colours over its image, each stretched to its own range: dark is least, yellow most.

    Args:
        image: (3, H, W) in [0, 1]. attention: (rows, columns), at least 0.

    Returns:
        (3, H, W) in [0, 1].
    """
    attention = F.interpolate(attention[None, None].float().cpu(), image.shape[1:], mode="bicubic")[0, 0].clamp(min=0)
    level = (attention - attention.min()) / (attention.max() - attention.min()).clamp(min=1e-12)  # (H, W)
    colours = matplotlib.colormaps[HEAT](level.numpy())[..., :3].astype(np.float32)  # (H, W, 3)
    grey = image.cpu().mean(0, keepdim=True)  # (1, H, W)
    return (0.35 * grey + 0.65 * torch.from_numpy(colours).permute(2, 0, 1)).clamp(0, 1)
