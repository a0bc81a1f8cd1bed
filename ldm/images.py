"""Writing samples: numbered PNG files that say how they were made, and grids."""

import json
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid


def numbered(folder: Path, pattern: str) -> Iterator[Path]:
    """Paths `pattern.format(i)` in the folder, which is made if need be, from behind the highest number there is."""
    folder.mkdir(parents=True, exist_ok=True)
    before, after = pattern.split("{")[0], pattern.split("}")[1]
    names = (path.name.removeprefix(before).removesuffix(after) for path in folder.glob(f"{before}*{after}"))
    start = max((int(name) for name in names if name.isdigit()), default=-1) + 1
    return (folder / pattern.format(i) for i in count(start))


def save_png(image: Tensor, path: Path, settings: Mapping[str, Any] | None = None) -> None:
    """Write one image (3, H, W) in [0, 1]; `settings` go into the PNG's text, strings as they are, the rest as JSON.

    Raises:
        FileExistsError: the file is there already.
        ValueError: the image has values that are not finite.
    """
    if not torch.isfinite(image).all():
        raise ValueError(f"{path}: the sample has values that are not finite; try --precision full")
    text = PngInfo()
    for key, value in (settings or {}).items():
        text.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    picture = to_pil_image((image.float().cpu() * 255).round().byte())
    with open(path, "xb") as file:
        picture.save(file, format="PNG", pnginfo=text)


def read_settings(path: Path) -> dict[str, str]:
    """The text of a PNG file."""
    with Image.open(path) as image:
        return dict(image.text)


def grid(images: Tensor, columns: int) -> Tensor:
    """(B, 3, H, W) -> one image, `columns` a row, with narrow gaps."""
    return make_grid(images, columns, padding=2, pad_value=1.0)
