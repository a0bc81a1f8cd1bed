import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.dataset import ConceptImages, read_captions, read_image


def picture(width: int = 8, height: int = 8) -> Image.Image:
    """Red on the left half, green on the right, black below its middle."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = 255
    pixels[: height // 2, width // 2 :, 1] = 255
    return Image.fromarray(pixels)


def rgb(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return image.convert("RGB").getpixel((x, y))


def test_images_masks_and_report(photos, caplog):
    caplog.set_level(logging.INFO, logger="data.dataset")
    images = ConceptImages(photos, 16, "cat")
    assert images.names == ["0.png", "1.png", "2.png"] and len(images) == 3
    assert images.images.shape == (3, 3, 16, 16) and images.images.dtype == torch.float32
    assert images.images.min() >= -1 and images.images.max() <= 1
    assert images.masks.shape == (3, 1, 16, 16)
    assert images.masks[0, 0, :, 0].eq(1).all() and images.masks[0, 0, :, -1].eq(0).all()
    assert images.captions == [[], [], []]
    assert "3 images, 20 pixels wide, used at 16; masks cover 50%" in caplog.text


def test_the_centre_is_kept(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255  # the middle third alone is white
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert ConceptImages(tmp_path, 10, "cat", mask="none").images.eq(1).all()
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "wide.png")
    assert ConceptImages(tmp_path, 10, "cat", mask="none").images.eq(1).all()


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: turn by 90° clockwise
    picture(16, 8).save(tmp_path / "a.png", exif=exif)
    upright = read_image(tmp_path / "a.png")
    assert upright.size == (8, 16)
    assert rgb(upright, 7, 0) == (255, 0, 0)  # what was top left is top right
    assert rgb(upright, 7, 15) == (0, 255, 0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16", "F", "LA", "RGBA"])
def test_every_mode_becomes_colour(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "F") else "a.png")
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
    elif mode == "F":
        image = Image.fromarray(np.full((4, 4), 128 / 255, np.float32))
    else:
        image = Image.new("RGB", (4, 4), (128, 128, 128) if mode != "1" else (255, 255, 255))
        image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.save(path)
    read = read_image(path)
    assert read.mode == ("RGBA" if mode in ("LA", "RGBA") else "RGB")
    assert rgb(read, 2, 2) == ((255,) * 3 if mode == "1" else (128,) * 3)


def test_transparent_places_are_white_and_the_alpha_channel_is_the_mask(tmp_path):
    image = picture().convert("RGBA")
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:4] = 100
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "a.png")
    images = ConceptImages(tmp_path, 8, "cat")
    assert images.images[0, :, 6, 4].tolist() == [1, 1, 1]
    assert images.masks[0, 0, :, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]  # divided by its maximum


def test_a_palette_with_transparency_has_an_alpha_channel(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(1, (0, 0, 2, 4))
    image.save(tmp_path / "a.png", transparency=0)
    images = ConceptImages(tmp_path, 4, "cat")
    assert images.masks[0, 0, 0].tolist() == [1, 1, 0, 0]


def test_soft_masks_keep_their_proportions(tmp_path):
    (tmp_path / "mask").mkdir()
    picture().convert("RGB").save(tmp_path / "a.jpg")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4], mask[:, 4:] = 120, 30
    Image.fromarray(mask).save(tmp_path / "mask" / "a.png")
    assert torch.allclose(ConceptImages(tmp_path, 8, "cat").masks[0, 0, 0], torch.tensor([1.0] * 4 + [0.25] * 4))


def test_label_masks_lie_beside_the_image_and_are_no_images(tmp_path):
    picture().save(tmp_path / "a.png")
    label = np.zeros((8, 8), np.uint8)
    label[2:4] = 1
    Image.fromarray(label).save(tmp_path / "a-masklabel.png")
    images = ConceptImages(tmp_path, 8, "cat")
    assert images.names == ["a.png"]
    assert images.masks[0, 0, :, 3].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


def test_no_masks_when_none_are_wanted(photos):
    assert ConceptImages(photos, 16, "cat", mask="none").masks is None


def test_captions_name_the_concept_by_its_superclass(tmp_path):
    path = tmp_path / "a.txt"
    assert read_captions(path, "cat") == []
    path.write_text("A Cat beside a catalogue\n\n a photo of {} \n")
    assert read_captions(path, "cat") == ["A {} beside a catalogue", "a photo of {}"]
    path.write_text("my stuffed  animal")
    assert read_captions(path, "stuffed animal") == ["my {}"]
    path.write_text("cats")
    with pytest.raises(ValueError, match="a.txt: the caption 'cats' names no 'cat'"):
        read_captions(path, "cat")


def write_empty_mask(photos: Path) -> None:
    Image.new("L", (24, 20)).save(photos / "mask" / "1.png")


def write_narrow_mask(photos: Path) -> None:
    Image.new("L", (10, 20), 255).save(photos / "mask" / "1.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda photos: (photos / "mask" / "1.png").unlink(),
            "1.png: has no mask; .*soft_segment.py --image_dir .*mask=none",
        ),
        (lambda photos: (photos / "1.png").write_bytes(b"x"), "1.png: cannot be read as an image"),
        (lambda photos: (photos / "mask" / "1.png").write_bytes(b"x"), "mask/1.png: cannot be read as an image"),
        (lambda photos: (photos / "1.png").write_bytes((photos / "1.png").read_bytes()[:300]), "1.png: cannot be read"),
        (write_empty_mask, "mask/1.png: the mask is empty"),
        (write_narrow_mask, "mask/1.png: 10×20 is not the shape of 1.png, 24×20"),
        (lambda photos: [file.unlink() for file in photos.glob("*.png")], "photos holds no image"),
        (lambda photos: photos.rename(photos.with_name("gone")), "data_root: there is no folder"),
    ],
)
def test_mistakes(photos, spoil, message):
    spoil(photos)
    with pytest.raises(ValueError, match=message):
        ConceptImages(photos, 16, "cat")
