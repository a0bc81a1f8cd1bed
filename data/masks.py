"""Masks of the photos in a folder, by CLIPSeg (`data/soft_segment.py` is the command)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clipseg.model import ClipSeg
from data.crop import MIDDLE, Crop, Place, around
from data.dataset import whole_mask
from data.doubts import covered, doubts
from data.images import over_white, png, read_image, read_mask
from data.photos import MASKS, OVERLAYS, fill_templates, find_photos
from data.preview import enlarge, overlay
from data.prompts import TEMPLATES
from ldm.util.files import clear, write

FAINT = 0.2  # a maximum that says: the word was not found


@dataclass(frozen=True)
class Coverage:
    """What a mask holds.

    Attributes:
        photo: the photo's name.
        mask: the mask's file; the photo itself where its alpha channel is the mask.
        made: whether it was written by this call.
        share: of pixels above half of the maximum, in [0, 1].
        maximum: of the mask, in [0, 1].
        doubts: what speaks against it.
    """

    photo: str
    mask: Path
    made: bool
    share: float
    maximum: float
    doubts: tuple[str, ...] = ()

    @classmethod
    def of(cls, photo: Path, file: Path, mask: Image.Image, made: bool, crop: Crop) -> "Coverage":
        """Of a mask (mode F) in [0, 1] and how the photo will be cropped."""
        top = mask.getextrema()[1]
        said = doubts(mask, place_of(mask, crop)) if top > 0 else []
        return cls(photo.name, file, made, covered(mask), top, tuple(said))

    def warning(self, super_class: str) -> str:
        """Why the mask is not to be trusted; "" where nothing speaks against it."""
        return f"hardly any {super_class} found" if self.maximum < FAINT else ", ".join(self.doubts)


def segment_folder(
    image_dir: str | Path,
    super_class: str,
    clipseg: ClipSeg,
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 4,
    overwrite: bool = False,
    crop: Crop = "subject",
) -> list[Coverage]:
    """Write `mask/<stem>.png` and `mask/overlay/<stem>.png` for each photo of a folder that has no mask.

    Args:
        image_dir: the folder.
        super_class: what to mask, such as "cat".
        clipseg: see `clipseg.weights.load`.
        templates: prompts with {} for the word.
        batch_size: photos at a time.
        overwrite: make masks for the photos that have one, too, be it a file or an alpha channel.
        crop: which square will be trained on: the overlays show it.

    Returns:
        One for each photo, sorted by name.

    Raises:
        ValueError: as `find_photos` and `fill_templates`, or a photo or mask cannot be read.
        OSError: the folder cannot be written to.
    """
    folder, prompts = find_photos(image_dir, overwrite), fill_templates(super_class, templates)
    clear(folder.root / MASKS)
    rows, wanted = {}, []
    for photo in folder.photos:
        kept = whole_mask(photo, read_image(photo.path))  # all are read before the first mask is written
        if kept is None or overwrite:
            wanted.append(photo.path)
        else:
            rows[photo.path] = Coverage.of(photo.path, photo.mask or photo.path, kept, False, crop)
    with tqdm(total=len(wanted), desc="masks", disable=not wanted) as bar:
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            images = [load_photo(path) for path in batch]  # each (1, 3, H, W)
            small = clipseg.masks(torch.cat([clipseg.squeeze(image) for image in images]), prompts)  # (B, S, S)
            for path, image, mask in zip(batch, images, small, strict=True):
                soft = enlarge(mask, image.shape[2:])  # (H, W)
                file, made = folder.mask_of(path), Image.fromarray(soft.cpu().numpy())
                shown = overlay(image[0], soft, place_of(made, crop))
                write(file.parent / OVERLAYS / file.name, png(shown))  # first: whoever has a mask is done
                write(file, png(soft[None]))
                rows[path] = Coverage.of(path, file, made, True, crop)
            bar.update(len(batch))
    return [rows[photo.path] for photo in folder.photos]


def place_of(mask: Image.Image, crop: Crop) -> Place:
    """Where the square lies that is trained on."""
    return around(mask) if crop == "subject" and mask.getextrema()[1] > 0 else MIDDLE


def load_photo(path: Path) -> Tensor:
    """A photo, upright, as (1, 3, H, W) in [0, 1]."""
    pixels = np.asarray(over_white(read_image(path)), dtype=np.float32) / 255
    return rearrange(torch.from_numpy(pixels), "h w c -> 1 c h w")


def load_mask(path: Path) -> Tensor:
    """A mask file as (H, W) in [0, 1]."""
    return torch.from_numpy(np.array(read_mask(path)))


def table(rows: Sequence[Coverage], super_class: str) -> str:
    """A line for each photo: share of pixels above half of the maximum, the maximum, and what is wrong."""
    width = max(len("photo"), *(len(row.photo) for row in rows))
    lines = [f"{'photo':<{width}}  share  maximum"]
    for row in rows:
        note = [] if row.made else [f"kept {'its alpha channel' if row.mask.name == row.photo else row.mask.name}"]
        note += [f"warning: {text}" for text in [row.warning(super_class)] if text]
        lines.append(f"{row.photo:<{width}}  {row.share:>5.1%}  {row.maximum:>7.2f}  {'; '.join(note)}".rstrip())
    return "\n".join(lines)
