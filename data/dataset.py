"""Photos of one concept: images, soft masks and captions from a folder."""

import math
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from data.captions import Caption, captions_of
from data.crop import MIDDLE, Crop, Place, around, share_inside, to_square
from data.doubts import LEAST_INSIDE, doubts
from data.images import opacity, opened, over_white, read_image, read_mask
from data.photos import Photo, PhotoFolder
from ldm.util.cli import UserError
from ldm.util.templates import bare

LARGEST = 8192  # pixels of a square's side
ENLARGED = 2.0  # times; a photo enlarged more than this is blurred, and its blur is learned
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # a second frame is more than a preview, as those of TIFF and a phone's JPEG


class ConceptImages:
    """The photos in a folder, cropped to squares of one size; `photos[i]` reads one, with its mask.

    All are read once to find mistakes and none is kept: memory does not grow with their number.

    `PhotoFolder` says which files are photos, masks and captions. Without a mask file the image's own alpha channel is
    its mask. A mask is divided by its maximum over the whole photo. A caption file has one caption a line.

    Args:
        data_root: the folder.
        image_size: side of the squares, in pixels.
        superclass: the noun that captions name the concept by; it becomes `{}` there. None: captions are not read.
        mask: "auto" wants a mask for every image; "none" learns from the whole squares.
        crop: "subject" is the square around the mask's mass, also where `mask` is "none"; "middle" is the centred one,
            which photos without a mask have in either case.
        key: the flag or key that names the folder.

    Attributes:
        folder: what it holds.
        names: file names, sorted; N of them.
        sizes: (width, height) of each photo, upright and before it is cropped, in pixels.
        places: where in each photo the square lies.
        cover: the mean of each mask in [0, 1]; [] without masks.
        image_size: S, the side of the squares.
        captions: one list per image; empty where there is no caption.

    Raises:
        ValueError: as `PhotoFolder.read` and `captions_of`; a file that cannot be read; a mask that is missing, empty,
            of another shape, or nearly all outside the square.
    """

    def __init__(
        self,
        data_root: str | Path,
        image_size: int,
        superclass: str | None,
        mask: Literal["auto", "none"] = "auto",
        crop: Crop = "middle",
        key: str = "data_root",
    ) -> None:
        self.folder = PhotoFolder.read(data_root, key)
        if not 1 <= image_size <= LARGEST:
            raise UserError(f"image_size: must be from 1 to {LARGEST}, not {image_size}")
        if crop not in ("subject", "middle"):
            raise UserError(f"crop: one of subject, middle is wanted, not {crop!r}")
        photos = self.folder.photos
        self.root, self.image_size = self.folder.root, image_size
        self.superclass = superclass if superclass is None else bare(superclass)
        self.masked, self.crop = mask == "auto", crop
        self.names = [photo.path.name for photo in photos]
        self.captions: list[list[Caption]] = [[] for _ in photos]
        if self.superclass is not None:
            self.captions = captions_of(self.folder, self.superclass)
        self.sizes: list[tuple[int, int]] = []
        self.places: list[Place] = []
        self.cover: list[float] = []
        self._found = self._transparent = 0  # masks in all, and those that are alpha channels
        self._notes: list[str] = []
        for photo in photos:
            image = read_image(photo.path)
            self.sizes.append(image.size)
            self.places.append(MIDDLE)
            if self.masked or crop == "subject":
                self._look_at_mask(photo, image)
            with opened(photo.path) as file:
                if file.format in ANIMATED and getattr(file, "is_animated", False):
                    self._notes.append(f"{photo.path}: is an animation, of which the first frame is taken")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Photo (3, S, S) float32 in [-1, 1], and mask (1, S, S) float32 in [0, 1], or None."""
        photo, place = self.folder.photos[index], self.places[index]
        image = read_image(photo.path)
        mask = self._square(whole_mask(photo, image), place) if self.masked else None
        return to_square(over_white(image), self.image_size, place) / 127.5 - 1, mask

    @property
    def images(self) -> Tensor:
        """All photos at once, (N, 3, S, S) float32 in [-1, 1]."""
        return torch.stack([image for image, _ in self])

    @property
    def masks(self) -> Tensor | None:
        """All masks at once, (N, 1, S, S) float32 in [0, 1]; or None."""
        return torch.stack([mask for _, mask in self]) if self.masked else None

    def report(self) -> str:
        """One line: how many photos of which sizes, what is cropped from them, masks and captions and their places."""
        original = _range([f"{width}×{height}" for width, height in sorted(self.sizes, key=math.prod)])
        square = _range([str(min(size)) for size in sorted(self.sizes, key=min)])
        many = "1 photo" if len(self) == 1 else f"{len(self)} photos"
        used = f"{self.image_size}×{self.image_size}"
        said = [f"{many} of {original} pixels", f"the {self._where(square)} is used at {used}", self._said_of_masks()]
        if captions := self.folder.count("caption"):
            said.append(f"captions ({captions})" + (" are not used" if self.superclass is None else ""))
        return "; ".join(said)

    def warnings(self) -> list[str]:
        """A line each: files that are left out, photos that are blurred, doubtful masks, animations."""
        left_out, blurred = self.folder.lacks(), self.enlarged()
        found = [f"{self.root}: left out: {left_out}"] if left_out else []
        return found + ([f"{self.root}: {blurred}"] if blurred else []) + self._notes

    def enlarged(self) -> str:
        """One line about the photos that are enlarged more than `ENLARGED` times; "" where there is none."""
        small = [
            f"{name} ({size[0]}×{size[1]}, {self.image_size / min(size):.1f}×)"
            for name, size in zip(self.names, self.sizes, strict=True)
            if self.image_size > ENLARGED * min(size)
        ]
        if not small:
            return ""
        return (
            f"{len(small)} of {len(self)} enlarged more than {ENLARGED:g}×, so that their blur is learned too: "
            f"{', '.join(small)}; use photos at least {self.image_size} pixels wide and high"
        )

    def _look_at_mask(self, photo: Photo, image: Image.Image) -> None:
        """Finds the square's place by the mask, and what speaks against that."""
        mask, file = whole_mask(photo, image), photo.mask or photo.path
        if mask is None and self.masked:
            command = f"python data/soft_segment.py --image_dir {self.root} --super_class {self.superclass!r}"
            raise UserError(f"{photo.path}: has no mask; make masks by `{command}`, or set mask=none")
        if mask is None:
            return
        if mask.getextrema()[1] <= 0:
            raise UserError(f"{file}: the mask is empty: white and opaque is what is learned")
        self._found, self._transparent = self._found + 1, self._transparent + (photo.mask is None)
        if self.crop == "subject":
            self.places[-1] = around(mask)
        if (inside := share_inside(mask, self.places[-1])) < LEAST_INSIDE:
            way = "crop the photo yourself" if self.crop == "subject" else "set crop=subject, or crop the photo"
            raise UserError(f"{file}: only {inside:.0%} of the mask lies in the square that would be used: {way}")
        self._notes += [f"{file}: {doubt}" for doubt in doubts(mask, self.places[-1])]
        if self.masked:
            self.cover.append(self._square(mask, self.places[-1]).mean().item())

    def _square(self, mask: Image.Image, place: Place) -> Tensor:
        """(1, S, S) float32 in [0, 1], of a whole mask."""
        return (to_square(mask, self.image_size, place) / mask.getextrema()[1]).clamp(0, 1)

    def _where(self, square: str) -> str:
        """The square in words."""
        if self.crop == "middle" or not self._found:
            return f"centred square of {square}"
        rest = len(self) - self._found
        return f"square of {square} around the subject" + (f" ({rest} without a mask: the centred one)" if rest else "")

    def _said_of_masks(self) -> str:
        files = [self.folder.count("mask"), f"{self._transparent} in alpha channels" if self._transparent else ""]
        files = ", ".join(filter(None, files))
        if self.masked:
            cover = _range([f"{share:.0%}" for share in sorted(self.cover)])
            return f"masks ({files}) cover {cover} of it, {sum(self.cover) / len(self):.0%} on average"
        unused = f"masks ({files}) are not used" if files else "no masks"
        return f"{unused}, the whole square is learned"


def whole_mask(photo: Photo, image: Image.Image) -> Image.Image | None:
    """The mask of a photo as floats (mode F) in [0, 1]: its file, or the image's own alpha channel; None without.

    Raises:
        UserError: it cannot be read, or is of another shape.
    """
    if photo.mask is not None:
        mask = read_mask(photo.mask)
        # a pixel more or less in either direction is rounding, not another shape
        if abs(mask.width * image.height - mask.height * image.width) > max(*mask.size, *image.size):
            of = f"{photo.path.name}, {image.width}×{image.height}"
            raise UserError(f"{photo.mask}: {mask.width}×{mask.height} is not the shape of {of}")
    elif image.mode == "RGBA" and image.getextrema()[3][0] < 255:
        mask = Image.fromarray(opacity(image))
    else:
        return None
    return mask


def _range(ordered: list[str]) -> str:
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"
