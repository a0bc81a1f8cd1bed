"""What a folder of photos holds: photos, their masks and captions, and what is left out. Imports nothing slow."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Self

from ldm.util.cli import UserError
from ldm.util.config import find
from ldm.util.templates import fill

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif")
UNREADABLE = (  # endings of images that nothing here reads
    *(".jxl", ".jp2", ".j2k", ".psd", ".xcf", ".kra", ".svg", ".eps", ".ai", ".tga", ".exr", ".hdr", ".ico", ".dds"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
)
CAPTIONS = (".txt", ".caption")  # beside a photo; the first is preferred
TABLES = (".csv", ".json", ".jsonl")  # where other tools have captions
MASKS, OVERLAYS, MASK_LABEL = "mask", "overlay", "-masklabel.png"
LIKE_A_MASK = re.compile(r"(.+)[-_. ](mask|masklabel|matte)", re.IGNORECASE)  # the stem of a photo's mask elsewhere
FOLDERS, NAMED = 1000, 6  # that are looked into below; names of a list that are said


@dataclass(frozen=True)
class Photo:
    """A photo and the files that belong to it; None where there is no such file."""

    path: Path
    mask: Path | None = None
    caption: Path | None = None


@dataclass(frozen=True)
class LeftOut:
    """A file or folder of which no use is made, why, and how many images that leaves out."""

    name: str
    why: str
    images: int = 0


@dataclass(frozen=True)
class PhotoFolder:
    """The photos of a folder and what else lies there. Whatever reads such a folder reads it by this.

    A photo is a file with one of `SUFFIXES`. Its mask is `mask/<same name>`, `mask/<stem>.png`, `<stem>-masklabel.png`
    or else another image of that stem in `mask/`; its caption is `<stem>.txt` or else `<stem>.caption`.

    Attributes:
        photos: sorted by name.
        left_out: sorted by name. Of hidden files it has images only.
    """

    root: Path
    photos: tuple[Photo, ...]
    left_out: tuple[LeftOut, ...]

    @classmethod
    def read(cls, folder: str | Path, key: str = "data_root") -> Self:
        """A folder that has photos; `key` is the flag or key that names it.

        Raises:
            UserError: as `look`, or there is no photo.
        """
        found = cls.look(folder, key)
        if found.photos:
            return found
        below = next((one for one in found.left_out if one.images and one.name.endswith("/")), None)
        hint = f"; {below.name} in it has {below.images}: name that folder" if below else f" ({', '.join(SUFFIXES)})"
        raise UserError(f"{key}: {folder} holds no image{hint}")

    @classmethod
    def look(cls, folder: str | Path, key: str = "data_root") -> Self:
        """A folder that may be empty.

        Raises:
            UserError: no such folder, an image of a kind that cannot be read, two photos of one stem, or a photo whose
                name says that it is the mask of another.
        """
        root = find(folder)
        if not root.is_dir():
            raise UserError(f"{key}: there is no folder {folder}")
        photos: dict[str, Photo] = {}
        images, left_out = [], []
        masks, captions = defaultdict(list), defaultdict(list)  # by the stem of the photo
        for path in sorted(root.iterdir()):
            if path.name.startswith("."):
                left_out += [LeftOut(path.name, "hidden", 1)] if path.suffix.lower() in SUFFIXES else []
            elif path.is_dir():
                left_out += _below(path) if path.name != MASKS else []
            elif path.name.endswith(MASK_LABEL) and path.is_file():
                masks[path.name.removesuffix(MASK_LABEL)].append(path)
            elif _is_image(path):
                images.append(path)
            elif path.suffix.lower() in CAPTIONS and path.is_file():
                captions[path.stem].append(path)
            else:
                table = path.suffix.lower() in TABLES
                why = "captions are read from <photo>.txt or .caption" if table else "neither photo, mask nor caption"
                left_out.append(LeftOut(path.name, why))
        for path in sorted((root / MASKS).iterdir()) if (root / MASKS).is_dir() else ():
            if _is_image(path):
                masks[path.stem].append(path)
            elif path.name != OVERLAYS and not path.name.startswith("."):
                left_out.append(LeftOut(f"{MASKS}/{path.name}", "not a mask"))
        for path in images:
            if path.stem in photos:
                raise UserError(
                    f"{key}: {photos[path.stem].path.name} and {path.name} in {folder} would share the mask and the "
                    "caption of that name: rename or remove one of them"
                )
            places = (root / MASKS / path.name, root / MASKS / f"{path.stem}.png", root / f"{path.stem}{MASK_LABEL}")
            own = sorted(masks.pop(path.stem, []), key=lambda one: places.index(one) if one in places else len(places))
            said = sorted(captions.pop(path.stem, []), key=lambda one: CAPTIONS.index(one.suffix.lower()))
            photos[path.stem] = Photo(path, own[0] if own else None, said[0] if said else None)
            for first, *others in filter(None, (own, said)):
                left_out += [LeftOut(_within(root, one), f"{_within(root, first)} is used") for one in others]
        for path in images:
            named = LIKE_A_MASK.fullmatch(path.stem)
            if named and named[1] in photos:
                of = photos[named[1]].path.name
                raise UserError(f"{path}: looks like the mask of {of}: move it to {MASKS}/{named[1]}.png, or rename it")
        for kind, unused in (("mask", masks), ("caption", captions)):
            left_out += [LeftOut(_within(root, one), f"{kind} of no photo") for ones in unused.values() for one in ones]
        return cls(root, tuple(photos.values()), tuple(sorted(left_out, key=lambda one: one.name)))

    def mask_of(self, photo: Path) -> Path:
        """Where `data.masks` writes the mask of a photo."""
        return self.root / MASKS / f"{photo.stem}.png"

    @property
    def images_left_out(self) -> int:
        return sum(one.images for one in self.left_out)

    def count(self, kind: str) -> str:
        """Where the files of a kind, "mask" or "caption", are from: "3 in mask/, 1 in -masklabel.png"; "" for none."""
        files = [getattr(photo, kind) for photo in self.photos if getattr(photo, kind)]
        ends = [f"{MASKS}/" if file.parent != self.root else MASK_LABEL for file in files]
        ends = [file.suffix for file in files] if kind == "caption" else ends
        return ", ".join(f"{ends.count(end)} in {end}" for end in sorted(set(ends)))

    def lacks(self) -> str:
        """One line of what is left out and why; "" where nothing is."""
        reasons: dict[str, list[str]] = defaultdict(list)
        for one in self.left_out:
            reasons[one.why].append(one.name)
        return "; ".join(f"{_listed(names)} ({why})" for why, names in reasons.items())

    def report(self) -> str:
        """One line of what was taken and what was not."""
        photos = "1 photo" if len(self.photos) == 1 else f"{len(self.photos)} photos"
        said = {"masks": self.count("mask") or "none", "captions": self.count("caption") or "none"}
        said |= {"left out": self.lacks()} if self.left_out else {}
        return "; ".join([photos, *(f"{name}: {text}" for name, text in said.items())])


def find_photos(image_dir: str | Path, overwrite: bool = False) -> PhotoFolder:
    """The photos to mask.

    Raises:
        UserError: as `PhotoFolder.read`, or a mask that training would prefer to one written with `overwrite`.
    """
    folder = PhotoFolder.read(image_dir, "image_dir")
    for photo in folder.photos if overwrite else ():
        own = folder.root / MASKS / photo.path.name
        if photo.mask == own != folder.mask_of(photo.path):
            raise UserError(f"{own}: training would still use this mask; remove it, or leave out overwrite")
    return folder


def _is_image(path: Path) -> bool:
    """Whether a file is an image; a link to nothing is one: whoever put it there will miss it when it is read.

    Raises:
        UserError: it is one that cannot be read.
    """
    if path.name.startswith(".") or not (path.is_file() or (path.is_symlink() and not path.exists())):
        return False
    if path.suffix.lower() in UNREADABLE:
        raise UserError(f"{path}: images of this kind cannot be read: convert it to PNG or JPEG, or move it elsewhere")
    return path.suffix.lower() in SUFFIXES


def _below(folder: Path) -> list[LeftOut]:
    """A folder below that of the photos: those in it that hold images, or itself."""
    found = []
    for parent, folders, names in islice(os.walk(folder), FOLDERS):
        folders[:] = sorted(name for name in folders if name != MASKS and not name.startswith("."))
        seen = [name for name in names if not name.startswith(".")]
        if images := sum(Path(name).suffix.lower() in SUFFIXES + UNREADABLE for name in seen):
            name = f"{_within(folder.parent, Path(parent))}/"
            found.append(LeftOut(name, f"a folder of its own with {images} images: name it to use them", images))
    return found or [LeftOut(f"{folder.name}/", "a folder without images")]


def _within(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


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
