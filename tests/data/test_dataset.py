import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.captions import Caption
from data.dataset import ConceptImages
from data.images import read_image, read_mask


def picture(width: int = 8, height: int = 8) -> Image.Image:
    """Red on the left half, green on the right, black below its middle."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = 255
    pixels[: height // 2, width // 2 :, 1] = 255
    return Image.fromarray(pixels)


def rgb(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return image.convert("RGB").getpixel((x, y))


def test_images_masks_and_report(photos):
    images = ConceptImages(photos, 16, "cat")
    assert images.names == ["0.png", "1.png", "2.png"] and len(images) == 3
    assert images.images.shape == (3, 3, 16, 16) and images.images.dtype == torch.float32
    assert images.images.min() >= -1 and images.images.max() <= 1
    assert images.masks.shape == (3, 1, 16, 16)
    assert images.masks[0, 0, :, 0].eq(1).all() and images.masks[0, 0, :, -1].eq(0).all()
    assert images.captions == [[], [], []]
    said = "3 photos of 24×20 pixels; the centred square of 20 is used at 16×16; masks (3 in mask/) cover "
    assert images.report() == said + "50% of it, 50% on average"


def test_the_report_gives_ranges(photos):
    Image.new("RGB", (40, 90)).save(photos / "tall.png")
    mask = Image.new("L", (40, 90), 255)
    mask.paste(0, (0, 25, 8, 65))
    mask.save(photos / "mask" / "tall.png")
    images = ConceptImages(photos, 16, "cat")
    assert images.sizes == [(24, 20)] * 3 + [(40, 90)]
    said = "4 photos of 24×20 to 40×90 pixels; the centred square of 20 to 40 is used at 16×16; masks (4 in mask/)"
    assert images.report() == said + " cover 50% to 80% of it, 58% on average"
    whole = ConceptImages(photos, 16, "cat", mask="none").report()
    assert whole.endswith("used at 16×16; masks (4 in mask/) are not used, the whole square is learned")


def test_photos_that_are_much_too_small_are_named(photos):
    assert ConceptImages(photos, 40, "cat").enlarged() == ""  # exactly twice
    Image.new("RGB", (10, 64)).save(photos / "thin.png")
    Image.new("RGB", (200, 100)).save(photos / "wide.png")
    said = ConceptImages(photos, 48, "cat", mask="none").enlarged()
    small = "0.png (24×20, 2.4×), 1.png (24×20, 2.4×), 2.png (24×20, 2.4×), thin.png (10×64, 4.8×)"
    blur = "4 of 5 enlarged more than 2×, so that their blur is learned too"
    assert said == f"{blur}: {small}; use photos at least 48 pixels wide and high"


def test_the_centre_is_kept(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255  # the middle third alone is white
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert ConceptImages(tmp_path, 10, "cat", mask="none").images.eq(1).all()
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "wide.png")
    assert ConceptImages(tmp_path, 10, "cat", mask="none").images.eq(1).all()


# EXIF 2.3, tag 0x0112: which side of the picture the first row and the first column of the file are
ORIENTATIONS = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],  # row 0 is the top, column 0 the right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright.swapaxes(0, 1)[::-1],  # right, top
    7: lambda upright: upright.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda upright: upright.swapaxes(0, 1)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["png", "jpg", "jfif", "tif", "avif", "heic"])
def test_exif_orientation_is_honoured(tmp_path, orientation, suffix):
    upright = np.zeros((32, 48, 3), np.uint8)  # four corners of different colours
    upright[:16, :24, 0], upright[:16, 24:, 1], upright[16:, :24, 2] = 250, 250, 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(ORIENTATIONS[orientation](upright))).save(path, exif=exif.tobytes())
    read = read_image(path)
    assert read.size == (48, 32)
    for x, y in [(4, 4), (44, 4), (4, 28), (44, 28)]:
        assert np.abs(np.subtract(rgb(read, x, y), upright[y, x])).max() < 8


def test_the_alpha_channel_turns_with_the_photo(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the file's first row is the right side, its first column the top
    image = Image.new("RGBA", (8, 8), "red")
    image.paste((255, 0, 0, 0), (0, 0, 8, 4))
    image.save(tmp_path / "a.png", exif=exif)
    assert ConceptImages(tmp_path, 8, "cat").masks[0, 0, 0].tolist() == [1] * 4 + [0] * 4


def as_png(values: np.ndarray) -> bytes:
    """A 16-bit PNG of (H, W, 1 to 4) values: grey, grey and alpha, RGB, RGBA."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def as_tiff(values: np.ndarray) -> bytes:
    """A 16-bit TIFF of (H, W, 3) values."""
    height, width, _ = values.shape
    data, longs, short = values.astype("<u2").tobytes(), {256: width, 257: height, 279: height * width * 6}, (3, 1)
    tags = [(tag, 4, 1, value) for tag, value in longs.items()]
    end = 8 + 2 + 12 * 9 + 4  # of the directory, where the three depths follow
    tags += [(258, 3, 3, end), (259, *short, 1), (262, *short, 2), (273, 4, 1, end + 6), (277, *short, 3)]
    tags = sorted([*tags, (278, 4, 1, height)])
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + b"\0" * 4
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<HHH", 16, 16, 16) + data


GREY, ALPHA = (128, 128, 128), (128, 128, 128, 64)
SIXTEEN = np.array([65535, 128 * 257, 64 * 257, 192 * 257])  # 255, 128, 64, 192 in 8 bits


def full(value: float, dtype: type) -> Image.Image:
    return Image.fromarray(np.full((16, 16), value, dtype))


@pytest.mark.parametrize(
    ("suffix", "content", "expected"),
    [
        ("png", Image.new("L", (16, 16), 128), GREY),
        ("png", Image.new("1", (16, 16), 1), (255, 255, 255)),
        ("png", Image.new("RGB", (16, 16), (255, 0, 0)).quantize(2), (255, 0, 0)),
        ("png", Image.new("RGBA", (16, 16), (10, 20, 30, 64)), (10, 20, 30, 64)),
        ("png", Image.new("LA", (16, 16), (128, 64)), ALPHA),
        ("tif", Image.new("CMYK", (16, 16), (0, 255, 0, 0)), (255, 0, 255)),
        ("jpg", Image.new("CMYK", (16, 16), (0, 255, 0, 0)), (255, 0, 255)),  # inverted in the file, as Adobe does
        ("jpg", Image.new("L", (16, 16), 128), GREY),
        ("bmp", Image.new("RGB", (16, 16), (255, 0, 128)), (255, 0, 128)),
        ("png", full(128 * 257, np.uint16), GREY),
        ("tif", full(128 * 257, np.uint16), GREY),
        ("tif", full(128 * 257, np.int32), GREY),
        ("tif", full(2**30, np.int32), (255, 255, 255)),  # beyond 16 bits the largest value is white
        ("tif", full(-5, np.int32), (0, 0, 0)),
        ("tif", full(128 / 255, np.float32), GREY),
        ("tif", full(128, np.float32), GREY),
        ("tif", full(-0.5, np.float32), (0, 0, 0)),
        ("png", as_png(np.tile(SIXTEEN[1], (4, 4, 1))), GREY),
        ("png", as_png(np.tile(SIXTEEN[1:3], (4, 4, 1))), ALPHA),
        ("png", as_png(np.tile(SIXTEEN[:3], (4, 4, 1))), (255, 128, 64)),
        ("png", as_png(np.tile(SIXTEEN, (4, 4, 1))), (255, 128, 64, 192)),
        ("tif", as_tiff(np.tile(SIXTEEN[:3], (4, 4, 1))), (255, 128, 64)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_mode_becomes_colour(tmp_path, suffix, content, expected):
    path = tmp_path / f"a.{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)
    read = read_image(path)
    assert read.mode == ("RGBA" if len(expected) == 4 else "RGB")
    assert np.abs(np.subtract(read.getpixel((2, 2)), expected)).max() <= (2 if suffix == "jpg" else 0)


def test_cmyk_of_adobe_is_marked_as_such(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 0, 0)).save(tmp_path / "a.jpg")
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()


def test_the_first_frame_of_an_animation_is_the_photo(tmp_path):
    first, *others = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue"))
    for name in ("a.gif", "b.webp", "c.png", "d.tif"):
        options = {"lossless": True} if name.endswith("webp") else {}
        first.save(tmp_path / name, save_all=True, append_images=others, **options)
        assert rgb(read_image(tmp_path / name), 3, 3) == (255, 0, 0)


def test_values_that_are_not_finite_are_refused(tmp_path):
    full(float("nan"), np.float32).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif: cannot be read as an image: it holds values that are not finite"):
        read_image(tmp_path / "a.tif")


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


def test_a_palette_may_have_half_transparent_colours(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0])
    image.paste(1, (1, 0, 2, 4))
    image.paste(2, (2, 0, 4, 4))
    image.save(tmp_path / "a.png", transparency=bytes([0, 51, 102]))
    images = ConceptImages(tmp_path, 4, "cat")
    assert images.masks[0, 0, 0].tolist() == [0, 0.5, 1, 1]
    mixed = torch.tensor([255 * 0.8 + 200 * 0.2, 255 * 0.8, 255 * 0.8]) / 127.5 - 1  # over white
    torch.testing.assert_close(images.images[0, :, 0, 1], mixed, atol=0.01, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "I;16", "F"])
def test_masks_may_be_of_any_mode(tmp_path, mode):
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 8, 4))
    if mode in ("I;16", "F"):
        values = np.asarray(mask, np.float32) / 255
        mask = Image.fromarray((values * 65535).astype(np.uint16) if mode == "I;16" else values)
    else:
        mask = mask.quantize(2) if mode == "P" else mask.convert(mode)
    path = tmp_path / ("mask.tif" if mode == "F" else "mask.png")
    mask.save(path)
    assert np.asarray(read_mask(path))[:, 3].tolist() == [1] * 4 + [0] * 4


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


def portrait(folder, top: int, bottom: int) -> None:
    """A grey photo of 20 × 60 that is white from one row to another, where its mask is grey."""
    (folder / "mask").mkdir(exist_ok=True)
    photo, mask = np.full((60, 20, 3), 100, np.uint8), np.zeros((60, 20), np.uint8)
    photo[top:bottom], mask[top:bottom] = 255, 100
    Image.fromarray(photo).save(folder / "a.png")
    Image.fromarray(mask).save(folder / "mask" / "a.png")


@pytest.mark.parametrize("mask", ["auto", "none"])
def test_the_crop_is_around_the_subject_with_or_without_masks(tmp_path, mask):
    portrait(tmp_path, 0, 12)
    images = ConceptImages(tmp_path, 20, "cat", mask, crop="subject")
    assert images.places == [(0.5, 0.0)]
    shown, masks = images[0]
    assert shown[0, :, 0].gt(0.9).tolist() == [True] * 12 + [False] * 8
    assert masks is None or masks[0, :, 0].tolist() == [1.0] * 12 + [0.0] * 8
    assert "the square of 20 around the subject is used" in images.report() and images.warnings() == []


def test_photos_without_a_mask_are_cropped_about_their_centre(tmp_path):
    portrait(tmp_path, 0, 12)
    Image.new("RGB", (20, 60)).save(tmp_path / "b.png")
    images = ConceptImages(tmp_path, 20, "cat", mask="none", crop="subject")
    assert images.places == [(0.5, 0.0), (0.5, 0.5)]
    assert "square of 20 around the subject (1 without a mask: the centred one) is used" in images.report()


@pytest.mark.parametrize(
    ("rows", "crop", "says"),
    [
        ((19, 29), "middle", ""),  # of which 9 lie in rows 20 to 39
        ((0, 23), "middle", "only 13% of the mask lies in the square that would be used: set crop=subject"),
        ((0, 60), "subject", "only 33% of the mask lies in the square that is used"),
        ((12, 26), "middle", "only 43% of the mask lies in the square that is used"),
    ],
)
def test_a_subject_that_the_square_cuts_is_told(tmp_path, rows, crop, says):
    portrait(tmp_path, rows[0], rows[1])
    if "would be used" in says:
        with pytest.raises(ValueError, match=f"mask/a.png: {says}"):
            ConceptImages(tmp_path, 20, "cat", crop=crop)
        return
    images = ConceptImages(tmp_path, 20, "cat", crop=crop)
    assert (f"{tmp_path}/mask/a.png: {says}" in images.warnings()) if says else images.warnings() == []
    if crop == "middle":  # what leaks in keeps its weight
        assert images.masks.max() == 1 and images.masks.mean().item() == pytest.approx((rows[1] - 20) / 20)


def test_a_faint_part_inside_the_square_stays_faint(tmp_path):
    portrait(tmp_path, 20, 40)
    mask = np.zeros((60, 20), np.uint8)
    mask[16:20], mask[20:40] = 200, 50
    Image.fromarray(mask).save(tmp_path / "mask" / "a.png")
    assert ConceptImages(tmp_path, 20, "cat").masks.max().item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("grey", "alpha", "left"),
    [  # brightness and opacity of the left and of the right half
        ((255, 255), (255, 0), 1.0),  # the shape is in the alpha channel
        ((255, 0), (255, 255), 1.0),
        ((255, 0), (128, 128), 128 / 255),
        ((128, 255), (255, 0), 128 / 255),
        ((255, 0), (255, 0), 1.0),
    ],
)
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_a_mask_is_brightness_times_opacity(tmp_path, grey, alpha, left, mode):
    halves = [np.tile(np.repeat(np.uint8(values), 4), (8, 1)) for values in (grey, alpha)]
    Image.merge("LA", [Image.fromarray(half) for half in halves]).convert(mode).save(tmp_path / "a.png")
    expected = [pytest.approx(left, abs=1e-3)] * 4 + [0] * 4
    assert np.asarray(read_mask(tmp_path / "a.png"))[3].tolist() == expected


def test_a_mask_that_is_black_where_it_is_opaque_is_empty(tmp_path):
    portrait(tmp_path, 20, 40)
    black = Image.new("LA", (20, 60))
    black.putalpha(Image.open(tmp_path / "mask/a.png"))
    black.save(tmp_path / "mask/a.png")
    with pytest.raises(ValueError, match="a.png: the mask is empty: white and opaque is what is learned"):
        ConceptImages(tmp_path, 20, "cat")


def test_the_account_names_captions_and_what_is_left_out(photos):
    (photos / "0.txt").write_text("a cat")
    (photos / "1.caption").write_text("a cat in the sun")
    (photos / "notes.md").touch()
    images = ConceptImages(photos, 16, "cat")
    assert images.captions == [
        [Caption(photos / "0.txt", 1, "a {}")],
        [Caption(photos / "1.caption", 1, "a {} in the sun")],
        [],
    ]
    assert images.report().endswith("; captions (1 in .caption, 1 in .txt)")
    assert images.warnings() == [f"{photos}: left out: notes.md (neither photo, mask nor caption)"]
    assert ConceptImages(photos, 16, None, mask="none").captions == [[], [], []]
