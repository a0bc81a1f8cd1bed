"""Photos of one concept: images, soft masks and captions from a folder."""

import io
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from data.photos import SUFFIXES, find_mask, is_image
from ldm.util.cli import UserError
from ldm.util.config import find
from ldm.util.files import read_text

LARGEST = 8192  # pixels of a square's side
ENLARGED = 2.0  # times; a photo enlarged more than this is blurred, and its blur is learned
CAPTIONS = 100_000  # bytes of a photo's captions, at most
ANIMATED = ("GIF", "PNG", "WEBP")  # a second frame is more than a preview, as those of TIFF and a phone's JPEG are

logger = logging.getLogger(__name__)


class ConceptImages:
    """The photos in a folder, cropped about their centre to squares of one size; `photos[i]` reads one, with its mask.

    All are read once to find mistakes and none is kept: memory does not grow with their number.

    A mask is looked for in `mask/<same name>`, `mask/<stem>.png`, `<stem>-masklabel.png`, and the image's own alpha
    channel, in this order, and divided by its maximum. `<stem>.txt` may hold captions, one a line.

    Args:
        data_root: the folder.
        image_size: side of the squares, in pixels.
        superclass: the noun that captions name the concept by; it becomes `{}` there.
        mask: "auto" wants a mask for every image; "none" uses no masks.

    Attributes:
        names: file names, sorted; N of them.
        sizes: (width, height) of each photo, upright and before it is cropped, in pixels.
        cover: the mean of each mask in [0, 1]; [] without masks.
        image_size: S, the side of the squares.
        captions: one list of templates with `{}` per image; empty where there is no caption.

    Raises:
        ValueError: no such folder, no image in it, a file that cannot be read, a mask that is missing, empty or of
            another shape, a caption without the superclass.
    """

    def __init__(self, data_root: str | Path, image_size: int, superclass: str, mask: Literal["auto", "none"] = "auto"):
        root = find(data_root)
        if not root.is_dir():
            raise UserError(f"data_root: there is no folder {data_root}")
        if not 1 <= image_size <= LARGEST:
            raise UserError(f"image_size: must be from 1 to {LARGEST}, not {image_size}")
        paths = [path for path in sorted(root.iterdir()) if is_image(path)]
        if not paths:
            raise UserError(f"data_root: {data_root} holds no image ({', '.join(SUFFIXES)})")
        self.root, self.image_size = root, image_size
        self.names = [path.name for path in paths]
        self.captions = [read_captions(path.with_suffix(".txt"), superclass) for path in paths]
        self.superclass, self.masked = superclass, mask == "auto"
        self.sizes: list[tuple[int, int]] = []
        self.cover: list[float] = []
        for path in paths:
            image = read_image(path)
            self.sizes.append(image.size)
            if self.masked:
                self.cover.append(_mask(path, image, image_size, superclass).mean().item())
            with _opened(path) as file:
                if file.format in ANIMATED and getattr(file, "is_animated", False):
                    logger.warning("warning: %s: is an animation, of which the first frame is taken", path)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Photo (3, S, S) float32 in [-1, 1], and mask (1, S, S) float32 in [0, 1] with maximum 1, or None."""
        path = self.root / self.names[index]
        image = read_image(path)
        mask = _mask(path, image, self.image_size, self.superclass) if self.masked else None
        return to_square(over_white(image), self.image_size) / 127.5 - 1, mask

    @property
    def images(self) -> Tensor:
        """All photos at once, (N, 3, S, S) float32 in [-1, 1]."""
        return torch.stack([image for image, _ in self])

    @property
    def masks(self) -> Tensor | None:
        """All masks at once, (N, 1, S, S) float32 in [0, 1], each with maximum 1; or None."""
        return torch.stack([mask for _, mask in self]) if self.masked else None

    def report(self) -> str:
        """One line: how many photos of which sizes, what is cropped from them, and how much of that is masked."""
        original = _range([f"{width}×{height}" for width, height in sorted(self.sizes, key=math.prod)])
        square = _range([str(min(size)) for size in sorted(self.sizes, key=min)])
        masked = "no masks, the whole square is learned"
        if self.masked:
            cover = _range([f"{share:.0%}" for share in sorted(self.cover)])
            masked = f"masks cover {cover} of it, {sum(self.cover) / len(self):.0%} on average"
        many = "1 photo" if len(self) == 1 else f"{len(self)} photos"
        used = f"{self.image_size}×{self.image_size}"
        return f"{many} of {original} pixels; the centred square of {square} is used at {used}; {masked}"

    def enlarged(self) -> str:
        """One line about the photos that are enlarged more than `ENLARGED` times; "" where there is none."""
        small = [
            f"{name} ({size[0]}×{size[1]}, {self.image_size / min(size):.1f}×)"
            for name, size in zip(self.names, self.sizes, strict=True)
            if self.image_size > ENLARGED * min(size)
        ]
        if not small:
            return ""
        return (
            f"{len(small)} of {len(self)} enlarged more than {ENLARGED:g}×, so that their blur is learned too: "
            f"{', '.join(small)}; use photos at least {self.image_size} pixels wide and high"
        )


def read_image(path: Path) -> Image.Image:
    """An image file, upright, as RGB or (with transparency) RGBA, 8 bits a channel; ValueError if it is unreadable."""
    with _opened(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray((_grey(image) * 255).round().astype(np.uint8))
        transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
        return image.convert("RGBA" if transparent else "RGB")


def read_mask(path: Path) -> Image.Image:
    """A mask file as floats (mode F) in [0, 1]; ValueError if it is unreadable."""
    with _opened(path) as file:
        return Image.fromarray(_grey(ImageOps.exif_transpose(file)))


def read_captions(path: Path, superclass: str) -> list[str]:
    """The lines of a caption file with the superclass turned into `{}`; [] when there is no such file.

    Raises:
        ValueError: a line names the superclass nowhere.
    """
    if not path.is_file():
        return []
    lines = read_text(path, CAPTIONS).splitlines()
    words = r"\s+".join(map(re.escape, superclass.split()))
    noun = re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)
    templates = []
    for line in filter(None, map(str.strip, lines)):
        template = line if "{}" in line else noun.sub("{}", line)
        if "{}" not in template:
            raise UserError(f"{path}: the caption {line!r} names no {superclass!r}: name the concept by its superclass")
        templates.append(template)
    return templates


def over_white(image: Image.Image) -> Image.Image:
    """Transparent places filled with white."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def png(image: Tensor) -> bytes:
    """A PNG file of (1, H, W) or (3, H, W) in [0, 1]."""
    file = io.BytesIO()
    to_pil_image(image.mul(255).round().byte().cpu()).save(file, "PNG", optimize=True)
    return file.getvalue()


def to_square(image: Image.Image, size: int) -> Tensor:
    """The largest centred square of an image, resized: (C, size, size) float32, in the image's own range."""
    method = Image.Resampling.BILINEAR if image.mode == "F" else Image.Resampling.LANCZOS
    pixels = np.asarray(ImageOps.fit(image, (size, size), method), dtype=np.float32)
    return rearrange(torch.from_numpy(pixels.copy()), "h w -> 1 h w" if pixels.ndim == 2 else "h w c -> c h w")


def _mask(path: Path, image: Image.Image, size: int, superclass: str) -> Tensor:
    """Soft mask (1, size, size) with maximum 1."""
    if (file := find_mask(path)) is not None:
        mask = read_mask(file)
        # a pixel more or less in either direction is rounding, not another shape
        if abs(mask.width * image.height - mask.height * image.width) > max(*mask.size, *image.size):
            raise UserError(
                f"{file}: {mask.width}×{mask.height} is not the shape of {path.name}, {image.width}×{image.height}"
            )
    elif image.mode == "RGBA" and image.getextrema()[3][0] < 255:
        mask = Image.fromarray(np.asarray(image.getchannel("A"), dtype=np.float32) / 255)
    else:
        command = f"python data/soft_segment.py --image_dir {path.parent} --super_class {superclass!r}"
        raise UserError(f"{path}: has no mask; make masks by `{command}`, or set mask=none")
    square = to_square(mask, size).clamp(0, 1)
    if square.max() <= 0:
        raise UserError(f"{file or path}: the mask is empty within the image's centred square")
    return square / square.max()


def _range(ordered: list[str]) -> str:
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file; what Pillow raises over it becomes a UserError that names the file."""
    try:
        with warnings.catch_warnings():  # of sizes that large cameras have; twice as much is an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except UnidentifiedImageError as error:  # its text is the path
        raise UserError(f"{path}: cannot be read as an image: no format that is known, or cut off") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read as an image: {error.strerror or error}") from error
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise UserError(f"{path}: has more than {most} million pixels: make it smaller") from error
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as an image: {error}") from error


def _grey(image: Image.Image) -> np.ndarray:
    """Brightness (H, W), float32 in [0, 1], of an image of any mode.

    White is 65535 in integer images, and 1, 255 or 65535 in float images; where there are larger values, the largest.
    """
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise UserError("it holds values that are not finite")
        tops = (1, 255, 65535) if image.mode == "F" else (65535,)
        white = next((top for top in tops if values.max() <= top), values.max())
        return values.clip(0) / white
    return np.asarray(image.convert("L"), dtype=np.float32) / 255
