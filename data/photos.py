"""Which files of a folder are photos, and what their masks are called."""

import os.path
from collections.abc import Iterable
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MASK_LABEL = "-masklabel.png"


def is_image(path: Path) -> bool:
    """Whether training takes a file as a photo: not hidden, no `*-masklabel.png`, no folder or pipe.

    A link to nothing is one: whoever put it there meant a photo, which is missed when it is read.
    """
    hidden = path.name.startswith(".") or path.name.endswith(MASK_LABEL)
    file = path.is_file() or (path.is_symlink() and not path.exists())
    return path.suffix.lower() in SUFFIXES and file and not hidden


def first_file(places: Iterable[Path]) -> Path | None:
    """The first of these paths at which there is a file; a path too long for the system has none."""
    return next((place for place in places if os.path.isfile(place)), None)
