"""Masks for a folder of photos, by CLIPSeg: how much each pixel belongs to what a word names.

    python data/soft_segment.py --image_dir photos/cat --super_class cat
    python data/soft_segment.py --image_dir photos/cat --super_class cat --model_weight rd64-uni-refined.pth --clip DIR
    python data/soft_segment.py --image_dir photos/cat --super_class cat --model_weight pocket    # 64-pixel drawings

`photos/cat/IMG_1.jpg` gets `photos/cat/mask/IMG_1.png`, which training finds, and for the eye
`photos/cat/mask/overlay/IMG_1.png`. A mask is CLIPSeg's sigmoid, averaged over the training templates, enlarged
bilinearly to the size of the upright photo and stored in 8 bits of grey. It is not divided by its maximum: training
does that, and the maximum says how surely the word was found. A photo that has a mask keeps it without `--overwrite`.

`--model_weight` is a Hugging Face folder of CLIPSeg (the files of `CIDAS/clipseg-rd64-refined`), or the original
decoder file `rd64-uni-refined.pth` with `--clip`, a CLIP ViT-B/16 in transformers' or OpenAI's layout (the files of
`openai/clip-vit-base-patch16`, or open_clip's), or `pocket`. Nothing is downloaded.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from data.photos import MASK_LABEL, first_file, is_image
from data.prompts import TEMPLATES
from ldm.util.cli import Parser, UserError, batch, find_device, report
from ldm.util.defaults import CLIPSEG
from ldm.util.templates import fill

if TYPE_CHECKING:  # what takes seconds to import is imported where it works, after the flags have been read
    from torch import Tensor

    from clipseg.model import ClipSeg

TINT, DIMMED, PREVIEW = (1.0, 0.25, 0.1), 0.35, 1024  # the overlay's colour, the light outside, its longer side
NEARLY_EMPTY, NEARLY_ALL, FAINT = 0.01, 0.9, 0.2


@dataclass(frozen=True)
class Photo:
    """A photo and where its masks lie.

    Attributes:
        path: the photo. mask: the file that is written for it. overlay: its preview.
        kept: a mask that is there already and is to stay; None where one is to be made.
    """

    path: Path
    mask: Path
    overlay: Path
    kept: Path | None


@dataclass(frozen=True)
class Coverage:
    """What a mask holds.

    Attributes:
        photo: the photo's name. mask: the mask's file. made: whether it was written by this call.
        share: of pixels above half of the maximum, in [0, 1]. maximum: of the mask, in [0, 1].
    """

    photo: str
    mask: Path
    made: bool
    share: float
    maximum: float

    def warning(self, super_class: str) -> str:
        """Why the mask is not to be trusted; "" where nothing speaks against it."""
        if self.maximum < FAINT:
            return f"hardly any {super_class} found"
        if self.share < NEARLY_EMPTY:
            return "nearly empty"
        return "nearly everything" if self.share > NEARLY_ALL else ""


def find_photos(image_dir: str | Path, overwrite: bool = False) -> list[Photo]:
    """The photos of a folder, sorted by name.

    Raises:
        ValueError: no such folder, no photo in it, two photos whose masks would have one name, or a mask that
            would go before one written with `overwrite`.
    """
    root = Path(image_dir)
    if not root.is_dir():
        raise UserError(f"image_dir: there is no folder {image_dir}")
    photos: dict[Path, Photo] = {}
    for path in filter(is_image, sorted(root.iterdir())):
        mask = root / "mask" / f"{path.stem}.png"
        if mask in photos:
            other = photos[mask].path
            raise UserError(f"{other.name} and {path.name} would share the mask {mask}: rename one of the photos")
        places = (root / "mask" / path.name, mask, path.with_name(path.stem + MASK_LABEL))  # as training looks for them
        there = first_file(places)
        if overwrite and there == places[0] != mask:
            raise UserError(f"{there}: training would go on using this mask; remove it, or leave out overwrite")
        photos[mask] = Photo(path, mask, mask.parent / "overlay" / mask.name, None if overwrite else there)
    if not photos:
        raise UserError(f"image_dir: {image_dir} holds no image")
    return list(photos.values())


def fill_templates(super_class: str, templates: Sequence[str]) -> list[str]:
    """The prompts; raises ValueError for an empty word, no template, or one without {}."""
    if not super_class.strip():
        raise UserError("super_class: is empty; name what to mask, such as cat")
    if not templates:
        raise UserError("templates: at least one is wanted")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"templates: {template!r} has no {{}} for the word")
    return [fill(template, [super_class.strip()]) for template in templates]


def segment_folder(
    image_dir: str | Path,
    super_class: str,
    clipseg: "ClipSeg",
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
        UserError: the folder cannot be written to.
    """
    import torch

    from data.dataset import png, read_image
    from ldm.util.files import clear, write

    clear(Path(image_dir) / "mask")
    photos, prompts = find_photos(image_dir, overwrite), fill_templates(super_class, templates)
    rows = {photo.path: measure(photo.path, photo.kept, read_kept(photo.kept), False) for photo in photos if photo.kept}
    wanted = [photo for photo in photos if not photo.kept]
    for photo in wanted:
        read_image(photo.path)  # before the first mask is written
    with tqdm(total=len(wanted), desc="masks", disable=not wanted) as bar:
        for start in range(0, len(wanted), batch_size):
            batch = wanted[start : start + batch_size]
            images = [to_tensor(photo.path) for photo in batch]  # each (1, 3, H, W)
            small = clipseg.masks(torch.cat([clipseg.squeeze(image) for image in images]), prompts)  # (B, S, S)
            for photo, image, mask in zip(batch, images, small, strict=True):
                soft = enlarge(mask, image.shape[2:])  # (H, W)
                write(photo.overlay, png(overlay(image[0], soft)))  # first: whoever has a mask is done
                write(photo.mask, png(soft[None]))
                rows[photo.path] = measure(photo.path, photo.mask, soft, True)
            bar.update(len(batch))
    return [rows[photo.path] for photo in photos]


def to_tensor(path: Path) -> "Tensor":
    """A photo, upright, as (1, 3, H, W) in [0, 1]."""
    import numpy as np
    import torch
    from einops import rearrange

    from data.dataset import over_white, read_image

    pixels = np.asarray(over_white(read_image(path)), dtype=np.float32) / 255
    return rearrange(torch.from_numpy(pixels), "h w c -> 1 c h w")


def read_kept(path: Path) -> "Tensor":
    """A mask file as (H, W) in [0, 1]."""
    import numpy as np
    import torch

    from data.dataset import read_mask

    return torch.from_numpy(np.array(read_mask(path)))


def enlarge(mask: "Tensor", size: Sequence[int]) -> "Tensor":
    """(S, S) -> (H, W), bilinear."""
    return resize(mask[None], size)[0].clamp(0, 1)


def resize(image: "Tensor", size: Sequence[int]) -> "Tensor":
    """(C, h, w) -> (C, H, W), bilinear."""
    import torch.nn.functional as F

    return F.interpolate(image[None], tuple(size), mode="bilinear", antialias=True)[0]


def overlay(image: "Tensor", mask: "Tensor") -> "Tensor":
    """The photo (3, H, W) as training will see the mask (H, W): light and tinted within, dim and grey without."""
    mask = mask / mask.max().clamp(min=1e-6)
    scale = min(1.0, PREVIEW / max(image.shape[1:]))
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.shape[1:]]
        image, mask = resize(image, size), enlarge(mask, size)
    within = 0.7 * image + 0.3 * image.new_tensor(TINT).view(3, 1, 1)
    without = DIMMED * image.mean(0, keepdim=True).expand(3, -1, -1)
    return mask * within + (1 - mask) * without


def measure(photo: Path, file: Path, mask: "Tensor", made: bool) -> Coverage:
    """Coverage of a mask (H, W) in [0, 1]."""
    top = mask.max().item()
    return Coverage(photo.name, file, made, (mask > top / 2).float().mean().item(), top)


def table(rows: Sequence[Coverage], super_class: str) -> str:
    """A line for each photo: share of pixels above half of the maximum, the maximum, and what is wrong."""
    width = max(len("photo"), *(len(row.photo) for row in rows))
    lines = [f"{'photo':<{width}}  share  maximum  "]
    for row in rows:
        note = [] if row.made else [f"kept {row.mask.name}"]
        note += [f"warning: {text}" for text in [row.warning(super_class)] if text]
        lines.append(f"{row.photo:<{width}}  {row.share:>5.1%}  {row.maximum:>7.2f}  {'; '.join(note)}")
    return "\n".join(line.rstrip() for line in lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Masks for a folder of photos, by CLIPSeg.")
    add = parser.add_argument
    add("--image_dir", metavar="DIR", help="folder of photos; gets mask/ and mask/overlay/", required=True)
    add("--super_class", metavar="WORD", help="what to mask, such as cat", required=True)
    add("--model_weight", metavar="PATH", help="CLIPSeg: a folder, the decoder file, or pocket", default=CLIPSEG)
    add("--clip", metavar="PATH", help="CLIP ViT-B/16, where --model_weight is the decoder alone")
    add("--config", metavar="FILE", help="config whose network, `clipseg`, --model_weight is a file of")
    add("--templates", nargs="+", metavar="TEXT", help="prompts with {}; None: those of training", default=None)
    add("--batch_size", type=batch, help="photos at a time", default=4)
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    add("--overwrite", action="store_true", help="make masks anew for photos that have one")
    return parser.parse_args(arguments)


@report
def main(arguments: list[str] | None = None) -> None:
    flags = parse(arguments)
    device, templates = find_device(flags.device), flags.templates or TEMPLATES
    find_photos(flags.image_dir, flags.overwrite), fill_templates(flags.super_class, templates)  # before what is slow
    from clipseg.weights import load

    clipseg = load(flags.model_weight, flags.clip, flags.config).to(device)
    rows = segment_folder(flags.image_dir, flags.super_class, clipseg, templates, flags.batch_size, flags.overwrite)
    print(table(rows, flags.super_class))
    made = [row for row in rows if row.made]
    if made:
        print(f"{len(made)} masks written; look at {made[0].mask.parent / 'overlay'}")
    if len(made) < len(rows):
        print(f"{len(rows) - len(made)} kept as they were; --overwrite makes them anew")


if __name__ == "__main__":
    main()
