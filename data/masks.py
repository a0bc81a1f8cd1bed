"""Masks of the photos in a folder, by CLIPSeg (`data/soft_segment.py` is the command)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from clipseg.model import ClipSeg
from data.dataset import over_white, png, read_image, read_mask
from data.photos import fill_templates, find_photos
from data.prompts import TEMPLATES
from ldm.util.files import clear, write

TINT, DIMMED, PREVIEW = (1.0, 0.25, 0.1), 0.35, 1024  # the overlay's colour, the light outside, its longer side
NEARLY_EMPTY, NEARLY_ALL, FAINT = 0.01, 0.9, 0.2


@dataclass(frozen=True)
class Coverage:
    """What a mask holds.

    Attributes:
        photo: the photo's name.
        mask: the mask's file.
        made: whether it was written by this call.
        share: of pixels above half of the maximum, in [0, 1].
        maximum: of the mask, in [0, 1].
    """

    photo: str
    mask: Path
    made: bool
    share: float
    maximum: float

    @classmethod
    def of(cls, photo: Path, file: Path, mask: Tensor, made: bool) -> "Coverage":
        """Of a mask (H, W) in [0, 1]."""
        top = mask.max().item()
        return cls(photo.name, file, made, (mask > top / 2).float().mean().item(), top)

    def warning(self, super_class: str) -> str:
        """Why the mask is not to be trusted; "" where nothing speaks against it."""
        if self.maximum < FAINT:
            return f"hardly any {super_class} found"
        if self.share < NEARLY_EMPTY:
            return "nearly empty"
        return "nearly everything" if self.share > NEARLY_ALL else ""


def segment_folder(
    image_dir: str | Path,
    super_class: str,
    clipseg: ClipSeg,
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 4,
    overwrite: bool = False,
) -> list[Coverage]:
    """Write `mask/<stem>.png` and `mask/overlay/<stem>.png` for each photo of a folder that has no mask.

    Args:
        image_dir: the folder.
        super_class: what to mask, such as "cat".
        clipseg: see `clipseg.weights.load`.
        templates: prompts with {} for the word.
        batch_size: photos at a time.
        overwrite: make masks for the photos that have one, too.

    Returns:
        One for each photo, sorted by name.

    Raises:
        ValueError: as `find_photos` and `fill_templates`, or a photo or mask cannot be read.
        OSError: the folder cannot be written to.
    """
    clear(Path(image_dir) / "mask")
    photos, prompts = find_photos(image_dir, overwrite), fill_templates(super_class, templates)
    rows = {p.path: Coverage.of(p.path, p.kept, load_mask(p.kept), made=False) for p in photos if p.kept}
    wanted = [photo for photo in photos if not photo.kept]
    for photo in wanted:
        read_image(photo.path)  # before the first mask is written
    with tqdm(total=len(wanted), desc="masks", disable=not wanted) as bar:
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            images = [load_photo(photo.path) for photo in batch]  # each (1, 3, H, W)
            small = clipseg.masks(torch.cat([clipseg.squeeze(image) for image in images]), prompts)  # (B, S, S)
            for photo, image, mask in zip(batch, images, small, strict=True):
                soft = enlarge(mask, image.shape[2:])  # (H, W)
                preview = photo.mask.parent / "overlay" / photo.mask.name
                write(preview, png(overlay(image[0], soft)))  # first: whoever has a mask is done
                write(photo.mask, png(soft[None]))
                rows[photo.path] = Coverage.of(photo.path, photo.mask, soft, made=True)
            bar.update(len(batch))
    return [rows[photo.path] for photo in photos]


def load_photo(path: Path) -> Tensor:
    """A photo, upright, as (1, 3, H, W) in [0, 1]."""
    pixels = np.asarray(over_white(read_image(path)), dtype=np.float32) / 255
    return rearrange(torch.from_numpy(pixels), "h w c -> 1 c h w")


def load_mask(path: Path) -> Tensor:
    """A mask file as (H, W) in [0, 1]."""
    return torch.from_numpy(np.array(read_mask(path)))


def enlarge(mask: Tensor, size: Sequence[int]) -> Tensor:
    """(S, S) -> (H, W), bilinear."""
    return resize(mask[None], size)[0].clamp(0, 1)


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """(C, h, w) -> (C, H, W), bilinear."""
    return F.interpolate(image[None], tuple(size), mode="bilinear", antialias=True)[0]


def overlay(image: Tensor, mask: Tensor) -> Tensor:
    """The photo (3, H, W) as training will see the mask (H, W): light and tinted within, dim and grey without."""
    mask = mask / mask.max().clamp(min=1e-6)
    scale = min(1.0, PREVIEW / max(image.shape[1:]))
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.shape[1:]]
        image, mask = resize(image, size), enlarge(mask, size)
    within = 0.7 * image + 0.3 * image.new_tensor(TINT).view(3, 1, 1)
    without = DIMMED * image.mean(0, keepdim=True).expand(3, -1, -1)
    return mask * within + (1 - mask) * without


def table(rows: Sequence[Coverage], super_class: str) -> str:
    """A line for each photo: share of pixels above half of the maximum, the maximum, and what is wrong."""
    width = max(len("photo"), *(len(row.photo) for row in rows))
    lines = [f"{'photo':<{width}}  share  maximum"]
    for row in rows:
        note = [] if row.made else [f"kept {row.mask.name}"]
        note += [f"warning: {text}" for text in [row.warning(super_class)] if text]
        lines.append(f"{row.photo:<{width}}  {row.share:>5.1%}  {row.maximum:>7.2f}  {'; '.join(note)}".rstrip())
    return "\n".join(lines)
