"""A report as one HTML file that needs no network: pictures are part of it."""

import base64
import io
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

TEMPLATES = Path(__file__).with_name("templates")


def data_uri(image: Tensor | Image.Image, zoom: int = 1) -> str:
    """A picture as a PNG within a page: (3, H, W) in [0, 1], or a PIL image; enlarged `zoom` times."""
    picture = to_pil_image((image.float().cpu() * 255).round().byte()) if isinstance(image, Tensor) else image
    if zoom != 1:
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def render(template: str, **values: Any) -> str:
    """Fill a template of `infusion/templates/`; every value is escaped, and one that is missing is an error."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["uri"] = data_uri
    environment.filters["figure"] = figure
    return environment.get_template(template).render(**values)


def figure(measured: dict[str, float], digits: int = 2) -> str:
    """A mean with its standard error: `0.81 ± 0.02`."""
    return f"{measured['value']:.{digits}f} ± {measured['stderr']:.{digits}f}"


def write(page: str, path: Path) -> None:
    """Write the page in one go: it is there whole, or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
