"""Photos of one concept: images, soft masks and captions from a folder."""

import logging
import re
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.config import find

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MASK_LABEL = "-masklabel.png"

logger = logging.getLogger(__name__)


class ConceptImages:
    """The photos in a folder, cropped about their centre to squares of one size.

    A mask is looked for in `mask/<same name>`, `mask/<stem>.png`, `<stem>-masklabel.png`, and the image's own alpha
    channel, in this order, and divided by its maximum. `<stem>.txt` may hold captions, one a line.

    Args:
        data_root: the folder.
        image_size: side of the squares, in pixels.
        superclass: the noun that captions name the concept by; it becomes `{}` there.
        mask: "auto" wants a mask for every image; "none" uses no masks.

    Attributes:
        names: file names, sorted; N of them.
        images: (N, 3, S, S) float32 in [-1, 1].
        masks: (N, 1, S, S) float32 in [0, 1], each with maximum 1; or None.
        captions: one list of templates with `{}` per image; empty where there is no caption.

    Raises:
        ValueError: no such folder, no image in it, a file that cannot be read, a mask that is missing, empty or of
            another shape, a caption without the superclass.
    """

    def __init__(self, data_root: str | Path, image_size: int, superclass: str, mask: Literal["auto", "none"] = "auto"):
        root = find(data_root)
        if not root.is_dir():
            raise ValueError(f"data_root: there is no folder {data_root}")
        if mask not in ("auto", "none"):
            raise ValueError(f"mask: must be auto or none, not {mask!r}")
        if image_size < 1:
            raise ValueError(f"image_size: must be at least 1, not {image_size}")
        paths = [path for path in sorted(root.iterdir()) if _is_image(path)]
        if not paths:
            raise ValueError(f"data_root: {data_root} holds no image ({', '.join(SUFFIXES)})")
        self.names = [path.name for path in paths]
        self.captions = [read_captions(path.with_suffix(".txt"), superclass) for path in paths]
        images, masks, sides = [], [], []
        for path in paths:
            image = read_image(path)
            sides.append(min(image.size))
            images.append(to_square(over_white(image), image_size) / 127.5 - 1)
            if mask == "auto":
                masks.append(_mask(path, image, image_size))
        self.images = torch.stack(images)
        self.masks = torch.stack(masks) if masks else None
        coverage = "no masks" if self.masks is None else f"masks cover {self.masks.mean():.0%}"
        size = f"{min(sides)} to {max(sides)} pixels wide" if min(sides) < max(sides) else f"{sides[0]} pixels wide"
        logger.info("%s: %d images, %s, used at %d; %s", root, len(self), size, image_size, coverage)

    def __len__(self) -> int:
        return len(self.names)


def read_image(path: Path) -> Image.Image:
    """An image file, upright, as RGB or (with transparency) RGBA, 8 bits a channel.

    Raises:
        ValueError: the file cannot be read.
    """
    image = _open(path)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray((_grey(image) * 255).round().astype(np.uint8))
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")


def read_mask(path: Path) -> Image.Image:
    """A mask file as floats (mode F) in [0, 1].

    Raises:
        ValueError: the file cannot be read.
    """
    return Image.fromarray(_grey(_open(path)))


def read_captions(path: Path, superclass: str) -> list[str]:
    """The lines of a caption file with the superclass turned into `{}`; [] when there is no such file.

    Raises:
        ValueError: a line names the superclass nowhere.
    """
    if not path.is_file():
        return []
    words = r"\s+".join(map(re.escape, superclass.split()))
    noun = re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)
    templates = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text: {error}") from error
    for line in filter(None, map(str.strip, lines)):
        template = line if "{}" in line else noun.sub("{}", line)
        if "{}" not in template:
            raise ValueError(
                f"{path}: the caption {line!r} names no {superclass!r}: name the concept by its superclass"
            )
        templates.append(template)
    return templates


def over_white(image: Image.Image) -> Image.Image:
    """Transparent places filled with white."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_square(image: Image.Image, size: int) -> Tensor:
    """The largest centred square of an image, resized: (C, size, size) float32, in the image's own range."""
    method = Image.Resampling.BILINEAR if image.mode == "F" else Image.Resampling.LANCZOS
    pixels = np.asarray(ImageOps.fit(image, (size, size), method), dtype=np.float32)
    return torch.from_numpy(pixels.reshape(size, size, -1).copy()).permute(2, 0, 1)


def _mask(path: Path, image: Image.Image, size: int) -> Tensor:
    """Soft mask (1, size, size) with maximum 1."""
    folder = path.parent / "mask"
    places = (folder / path.name, folder / f"{path.stem}.png", path.with_name(path.stem + MASK_LABEL))
    file = next((place for place in places if place.is_file()), None)
    if file is not None:
        mask = read_mask(file)
        # a pixel more or less in either direction is rounding, not another shape
        if abs(mask.width * image.height - mask.height * image.width) > max(*mask.size, *image.size):
            raise ValueError(
                f"{file}: {mask.width}×{mask.height} is not the shape of {path.name}, {image.width}×{image.height}"
            )
    elif image.mode == "RGBA" and image.getextrema()[3][0] < 255:
        mask = Image.fromarray(np.asarray(image.getchannel("A"), dtype=np.float32) / 255)
    else:
        command = f"python data/soft_segment.py --image_dir {path.parent}"
        raise ValueError(f"{path}: has no mask; make masks by `{command}`, or set mask=none")
    square = to_square(mask, size).clamp(0, 1)
    if square.max() <= 0:
        raise ValueError(f"{file or path}: the mask is empty within the image's centred square")
    return square / square.max()


def _is_image(path: Path) -> bool:
    hidden = path.name.startswith(".") or path.name.endswith(MASK_LABEL)
    return path.suffix.lower() in SUFFIXES and path.is_file() and not hidden


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error


def _grey(image: Image.Image) -> np.ndarray:
    """Brightness (H, W), float32 in [0, 1], of an image of any mode."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float32)
        depth = next(top for top in (1, 255, 65535, np.inf) if values.max() <= top) if image.mode[0] == "F" else 65535
        return values / (values.max() if np.isinf(depth) else depth)
    return np.asarray(image.convert("L"), dtype=np.float32) / 255
