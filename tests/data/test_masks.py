import numpy as np
import pytest
import torch
from PIL import Image

from clipseg.model import ClipSeg
from data.dataset import ConceptImages
from data.masks import Coverage, segment_folder, table
from data.photos import fill_templates, find_photos
from data.preview import overlay
from data.prompts import TEMPLATES
from ldm.util.config import ROOT, load_config


class Redness(ClipSeg):
    """Masks what is red: the share of red in each pixel, halved where a prompt names no apple."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.image_size, self.sizes, self.prompts = 32, [], []

    def masks(self, images, prompts):
        self.sizes.append(len(images))
        self.prompts = list(prompts)
        red = (images[:, 0] - images[:, 1]).clamp(0, 1)
        return red * (1.0 if "apple" in prompts[0] else 0.5)


@pytest.fixture
def model() -> Redness:
    return Redness()


def picture(width: int = 60, height: int = 40, left: float = 0.5) -> np.ndarray:
    """Red on the left, grey on the right."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    pixels[:, : int(width * left)] = (255, 0, 0)
    return pixels


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.png"):
        Image.fromarray(picture()).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a photo")
    return tmp_path


def read(path) -> np.ndarray:
    image = Image.open(path)
    assert image.mode == "L"
    return np.asarray(image) / 255


def test_masks_are_soft_greyscale_at_the_photos_size(folder, model):
    rows = segment_folder(folder, "apple", model)
    assert [(row.photo, row.mask.name, row.made) for row in rows] == [
        ("a.jpg", "a.png", True),
        ("b.png", "b.png", True),
    ]
    mask = read(folder / "mask/b.png")
    assert mask.shape == (40, 60)
    assert mask[:, :25].min() > 0.99 and mask[:, 35:].max() < 0.01
    assert 0.05 < mask[20, 29] < 0.95 or 0.05 < mask[20, 30] < 0.95  # the edge is blurred by the enlargement
    assert rows[1].share == pytest.approx(0.5, abs=0.03) and rows[1].maximum == pytest.approx(1, abs=0.01)


def test_a_mask_is_not_divided_by_its_maximum(folder, model):
    rows = segment_folder(folder, "pear", model)
    assert read(folder / "mask/b.png").max() == pytest.approx(0.5, abs=0.005)
    assert rows[1].maximum == pytest.approx(0.5, abs=0.005) and rows[1].share == pytest.approx(0.5, abs=0.03)


def test_training_finds_masks_and_not_overlays(folder, model):
    segment_folder(folder, "apple", model)
    data = ConceptImages(folder, 20, "apple")
    assert data.names == ["a.jpg", "b.png"]
    assert (data.masks[:, :, :, :8] > 0.95).all() and (data.masks[:, :, :, 12:] < 0.05).all()
    assert (folder / "mask/overlay/a.png").is_file() and (folder / "mask/overlay/b.png").is_file()


def test_masks_match_upright_photos(tmp_path, model):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to show
    Image.fromarray(picture()).save(tmp_path / "turned.png", exif=exif)
    segment_folder(tmp_path, "apple", model)
    mask = read(tmp_path / "mask/turned.png")
    assert mask.shape == (60, 40)
    assert mask[:25].min() > 0.99 and mask[35:].max() < 0.01
    assert ConceptImages(tmp_path, 20, "apple").masks[0, 0, 0].min() > 0.9


def test_a_mask_that_is_there_is_kept(folder, model):
    mine = np.full((40, 60), 77, np.uint8)
    (folder / "mask").mkdir()
    Image.fromarray(mine).save(folder / "mask/a.png")
    rows = segment_folder(folder, "apple", model)
    assert [row.made for row in rows] == [False, True] and model.sizes == [1]
    assert np.array_equal(np.asarray(Image.open(folder / "mask/a.png")), mine)
    assert rows[0].maximum == pytest.approx(77 / 255, abs=1e-3) and rows[0].share == 1
    assert not (folder / "mask/overlay/a.png").exists()
    assert [row.made for row in segment_folder(folder, "apple", model)] == [False, False]
    assert [row.made for row in segment_folder(folder, "apple", model, overwrite=True)] == [True, True]
    assert read(folder / "mask/a.png").max() > 0.99


@pytest.mark.parametrize("place", ["mask/a.jpg", "a-masklabel.png"])
def test_masks_elsewhere_are_kept_too(folder, model, place):
    (folder / "mask").mkdir()
    Image.fromarray(picture()[..., 0]).save(folder / place)
    before = (folder / place).read_bytes()
    rows = segment_folder(folder, "apple", model)
    assert [row.made for row in rows] == [False, True] and not (folder / "mask/a.png").exists()
    assert rows[0].mask == folder / place and (folder / place).read_bytes() == before


def test_a_mask_that_training_would_prefer_is_not_overwritten_in_vain(folder):
    (folder / "mask").mkdir()
    Image.fromarray(picture()[..., 0]).save(folder / "mask/a.jpg")
    with pytest.raises(ValueError, match="a.jpg: training would still use this mask"):
        find_photos(folder, overwrite=True)


def test_two_photos_of_one_stem_are_refused(folder, model):
    Image.fromarray(picture()).save(folder / "a.webp")
    with pytest.raises(ValueError, match="a.jpg and a.webp in .* would share the mask"):
        segment_folder(folder, "apple", model)
    assert not (folder / "mask").exists()


def test_photos_are_taken_in_batches_with_the_same_result(tmp_path, model):
    for i in range(5):
        Image.fromarray(picture(50 + i, 40, 0.2 + 0.1 * i)).save(tmp_path / f"{i}.png")
    segment_folder(tmp_path, "apple", model, batch_size=2)
    assert model.sizes == [2, 2, 1]
    together = [read(tmp_path / f"mask/{i}.png") for i in range(5)]
    segment_folder(tmp_path, "apple", model, batch_size=1, overwrite=True)
    assert all(np.array_equal(read(tmp_path / f"mask/{i}.png"), mask) for i, mask in enumerate(together))
    assert [mask.mean() for mask in together] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6], abs=0.02)


def test_prompts_are_the_training_templates():
    assert list(load_config(ROOT / "configs/data/photos.yaml").templates) == list(TEMPLATES)
    prompts = fill_templates("stuffed animal", TEMPLATES)
    assert len(prompts) == 11 and prompts[0] == "a photo of a stuffed animal" and prompts[-1] == "stuffed animal"


@pytest.mark.parametrize(
    ("word", "templates", "message"),
    [(" ", TEMPLATES, "super_class"), ("cat", [], "at least one"), ("cat", ["a photo"], "has no {}")],
)
def test_prompts_that_name_nothing_are_refused(word, templates, message):
    with pytest.raises(ValueError, match=message):
        fill_templates(word, templates)


def test_the_overlay_is_light_and_tinted_within_and_dim_grey_without():
    image, mask = torch.full((3, 10, 10), 0.5), torch.zeros(10, 10)
    image[0] = 0.8
    mask[:, :5] = 0.4  # the maximum counts as 1
    shown = overlay(image, mask)
    assert shown[0, 5, 2] > 0.8 and shown[0, 5, 2] > shown[2, 5, 2] + 0.3
    assert (shown[:, 5, 8] - 0.21).abs().max() < 0.01
    assert overlay(torch.rand(3, 2000, 1000), torch.rand(2000, 1000)).shape == (3, 1024, 512)


def test_the_table_warns_of_masks_that_cannot_be_right(tmp_path):
    def row(share, maximum, made=True, doubts=()):
        return Coverage("photo.jpg", tmp_path / "mask/photo.png", made, share, maximum, doubts)

    assert row(0.3, 0.9).warning("cat") == ""
    assert row(0.3, 0.9, doubts=("nearly empty", "looks inverted")).warning("cat") == "nearly empty, looks inverted"
    assert row(0.3, 0.05).warning("cat") == "hardly any cat found"
    lines = table([row(0.312, 0.9), row(0.95, 1.0, made=False, doubts=("nearly empty",))], "cat").splitlines()
    assert lines[1].split() == ["photo.jpg", "31.2%", "0.90"]
    assert lines[2].split(maxsplit=3)[3] == "kept photo.png; warning: nearly empty"


def test_an_empty_folder_and_a_broken_photo_are_named(tmp_path, model):
    with pytest.raises(ValueError, match="holds no image"):
        segment_folder(tmp_path, "apple", model)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="broken.png: cannot be read"):
        segment_folder(tmp_path, "apple", model)
    assert not (tmp_path / "mask").exists()


def test_a_photo_s_own_alpha_channel_stays_its_mask(folder, model):
    photo = Image.fromarray(picture()).convert("RGBA")
    photo.putalpha(Image.fromarray(np.uint8(picture()[..., 0] > 200) * 255))
    photo.save(folder / "b.png")
    rows = segment_folder(folder, "apple", model)
    assert [row.made for row in rows] == [True, False] and not (folder / "mask/b.png").exists()
    assert table(rows, "apple").splitlines()[2].endswith("kept its alpha channel")
    assert [row.made for row in segment_folder(folder, "apple", model, overwrite=True)] == [True, True]


def test_a_mask_that_the_square_will_cut_is_told(tmp_path, model):
    Image.fromarray(picture(80, 40, 0.25)).save(tmp_path / "a.png")  # red in the first 20 of 80 columns
    (row,) = segment_folder(tmp_path, "apple", model, crop="middle")
    assert row.warning("apple").startswith("only ") and "of the mask lies in the square" in row.warning("apple")
    (row,) = segment_folder(tmp_path, "apple", model, overwrite=True)
    assert row.warning("apple") == ""
