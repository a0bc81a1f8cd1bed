"""Which files of a folder are photos, and where their masks lie. Imports nothing slow."""

import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.util.cli import UserError
from ldm.util.templates import fill

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MASK_LABEL = "-masklabel.png"


def is_image(path: Path) -> bool:
    """Whether training takes a file as a photo: not hidden, no `*-masklabel.png`, no folder or pipe.

    A link to nothing is one: whoever put it there meant a photo, which is missed when it is read.
    """
    hidden = path.name.startswith(".") or path.name.endswith(MASK_LABEL)
    file = path.is_file() or (path.is_symlink() and not path.exists())
    return path.suffix.lower() in SUFFIXES and file and not hidden


def find_mask(photo: Path) -> Path | None:
    """The mask file that training uses for a photo; None where there is none."""
    folder = photo.parent / "mask"
    places = (folder / photo.name, folder / f"{photo.stem}.png", photo.with_name(photo.stem + MASK_LABEL))
    return next((place for place in places if os.path.isfile(place)), None)  # not where a path is too long


@dataclass(frozen=True)
class Photo:
    """A photo, the mask that `data.masks` writes for it, and a mask that is there already and stays, if any."""

    path: Path
    mask: Path
    kept: Path | None = None


def find_photos(image_dir: str | Path, overwrite: bool = False) -> list[Photo]:
    """The photos of a folder, sorted by name; with `overwrite`, no mask stays.

    Raises:
        ValueError: no such folder, no photo in it, two photos whose masks would have one name, or a mask that training
            would prefer to one written with `overwrite`.
    """
    root = Path(image_dir)
    if not root.is_dir():
        raise UserError(f"image_dir: there is no folder {image_dir}")
    photos: dict[Path, Photo] = {}
    for path in filter(is_image, sorted(root.iterdir())):
        mask, there = root / "mask" / f"{path.stem}.png", find_mask(path)
        if mask in photos:
            other = photos[mask].path.name
            raise UserError(f"{other} and {path.name} would share the mask {mask}: rename one of the photos")
        if overwrite and there == mask.with_name(path.name) != mask:
            raise UserError(f"{there}: training would still use this mask; remove it, or leave out overwrite")
        photos[mask] = Photo(path, mask, None if overwrite else there)
    if not photos:
        raise UserError(f"image_dir: {image_dir} holds no image")
    return list(photos.values())


def fill_templates(super_class: str, templates: Sequence[str]) -> list[str]:
    """CLIPSeg's prompts for a word; raises ValueError for an empty word, no template, or one without {}."""
    if not super_class.strip():
        raise UserError("super_class: is empty; name what to mask, such as cat")
    if not templates:
        raise UserError("templates: at least one is wanted")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"templates: {template!r} has no {{}} for the word")
    return [fill(template, [super_class.strip()]) for template in templates]
