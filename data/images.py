"""Image files as photos and masks: every mode, upright, and one line about a file that cannot be read."""

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from pillow_heif import register_heif_opener
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ldm.util.cli import UserError

register_heif_opener()


def read_image(path: Path) -> Image.Image:
    """An image file, upright, as RGB or (with transparency) RGBA, 8 bits a channel; ValueError if it is unreadable."""
    with opened(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray((_grey(image) * 255).round().astype(np.uint8))
        return image.convert("RGBA" if image.has_transparency_data else "RGB")


def read_mask(path: Path) -> Image.Image:
    """A mask file, brightness × opacity, as floats (mode F) in [0, 1]; ValueError if it is unreadable."""
    with opened(path) as file:
        image = ImageOps.exif_transpose(file)
        values = _grey(image)
        if image.has_transparency_data and not image.mode.startswith(("I", "F")):
            image = image.convert("RGBA")
            values = _grey(image.convert("RGB")) * opacity(image)
        return Image.fromarray(values)


def opacity(image: Image.Image) -> np.ndarray:
    """The alpha channel of an RGBA image, (H, W) float32 in [0, 1]."""
    return np.asarray(image.getchannel("A"), dtype=np.float32) / 255


def over_white(image: Image.Image) -> Image.Image:
    """Transparent places filled with white."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def png(image: Tensor, text: Mapping[str, str] | None = None) -> bytes:
    """A PNG file of (1, H, W) or (3, H, W) in [0, 1], with text in it by key."""
    file, said = io.BytesIO(), PngInfo()
    for key, value in (text or {}).items():
        said.add_text(key, value)
    to_pil_image(image.mul(255).round().byte().cpu()).save(file, "PNG", optimize=True, pnginfo=said)
    return file.getvalue()


def text_of(path: Path) -> dict[str, str]:
    """The text of an image file by key; {} where it has none. Raises ValueError if the file is unreadable."""
    with opened(path) as file:
        return {str(key): value for key, value in file.info.items() if isinstance(value, str)}


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
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
