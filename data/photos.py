"""Which files of a folder are photos, and what their masks are called."""

from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MASK_LABEL = "-masklabel.png"


def is_image(path: Path) -> bool:
    """Whether training takes a file as a photo: not hidden, no `*-masklabel.png`."""
    hidden = path.name.startswith(".") or path.name.endswith(MASK_LABEL)
    return path.suffix.lower() in SUFFIXES and path.is_file() and not hidden
