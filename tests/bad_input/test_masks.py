"""Masks that do not fit their photos, or cannot be read."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.dataset import ConceptImages
from ldm.util.config import ROOT

TRAIN = [
    *("--base", ROOT / "configs/pocket_demo.yaml", "-t", "--logdir", "FOLDER/run", "data_root=FOLDER/photos"),
    *("callbacks.samples=null", "trainer.max_steps=1", "trainer.enable_progress_bar=false"),
]


def grey(value: float, size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.new("L", size, value)


def floats(value: float) -> Image.Image:
    values = np.ones((40, 60), np.float32)
    values[0, 0] = value
    return Image.fromarray(values)


def cut(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:500])


def corner(path: Path) -> None:
    """White where the centred square does not reach."""
    mask = grey(0)
    mask.paste(255, (0, 0, 8, 40))
    mask.save(path)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {  # what makes the mask, and what is said of it
    "missing": (lambda path: None, "0.png: has no mask; make masks by"),
    "folder": (Path.mkdir, "0.png: has no mask"),
    "pipe": (os.mkfifo, "0.png: has no mask"),
    "empty": (Path.touch, "mask/0.png: cannot be read as an image"),
    "text": (lambda path: path.write_text("white"), "mask/0.png: cannot be read as an image"),
    "truncated": (cut, "mask/0.png: cannot be read as an image"),
    "turned": (lambda path: grey(255, (40, 60)).save(path), "mask/0.png: 40×60 is not the shape of 0.png, 60×40"),
    "another shape": (lambda path: grey(255, (60, 60)).save(path), "mask/0.png: 60×60 is not the shape"),
    "black": (lambda path: grey(0).save(path), "mask/0.png: the mask is empty"),
    "black in the square": (corner, "mask/0.png: the mask is empty within the image's centred square"),
    "nan": (lambda path: floats(float("nan")).save(path, "TIFF"), "mask/0.png: cannot be read as an image: it holds"),
    "inf": (lambda path: floats(float("inf")).save(path, "TIFF"), "mask/0.png: cannot be read as an image: it holds"),
    "bomb": (lambda path: Image.new("1", (16_000, 16_000)).save(path), "mask/0.png: cannot be read as an image"),
}


@pytest.fixture
def mask(bench) -> Path:
    """Where the mask of a photo of 60 × 40 belongs."""
    (bench.folder / "photos" / "mask").mkdir(parents=True)
    Image.new("RGB", (60, 40), "red").save(bench.folder / "photos" / "0.png")
    return bench.folder / "photos" / "mask" / "0.png"


@pytest.mark.parametrize("case", REFUSED)
def test_a_mask_that_says_nothing_is_named(bench, mask, case):
    make, says = REFUSED[case]
    make(mask)
    bench.refuse("main.py", *TRAIN, says=says)


@pytest.mark.parametrize("case", ["empty", "truncated", "nan", "bomb"])
def test_a_mask_that_is_there_must_be_readable_to_be_kept(bench, mask, case):
    make, says = REFUSED[case]
    make(mask)
    flags = ["--image_dir", "FOLDER/photos", "--super_class", "dog", "--model_weight", "pocket", "--device", "cpu"]
    bench.refuse("soft_segment", *flags, says=says)


TAKEN: dict[str, Callable[[Path], object]] = {
    "white": lambda path: grey(255).save(path),
    "faint": lambda path: grey(1).save(path),  # divided by its maximum
    "colour": lambda path: Image.new("RGB", (60, 40), "white").save(path),
    "palette": lambda path: grey(255).convert("P").save(path),
    "one bit": lambda path: Image.new("1", (60, 40), 1).save(path),
    "transparent": lambda path: Image.new("RGBA", (60, 40), (255, 255, 255, 255)).save(path),
    "sixteen bits": lambda path: Image.fromarray(np.full((40, 60), 30_000, np.uint16)).save(path),
    "floats": lambda path: floats(1).save(path, "TIFF"),
    "smaller": lambda path: grey(200, (30, 20)).save(path),
    "a pixel off": lambda path: grey(200, (59, 40)).save(path),
    "cmyk": lambda path: Image.new("CMYK", (60, 40), (0, 0, 0, 0)).save(path, "TIFF"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_mask_of_one_value_is_one_everywhere(mask, case):
    TAKEN[case](mask)
    masked = ConceptImages(mask.parents[1], 16, "dog")
    torch.testing.assert_close(masked[0][1], torch.ones(1, 16, 16))
    assert masked.report().endswith("masks cover 100% of it, 100% on average")
