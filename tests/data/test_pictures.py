import pytest
import torch
from PIL import Image, PngImagePlugin

from data.pictures import read_pictures


@pytest.fixture
def folder(tmp_path):
    """Four pictures, as grey as their numbers, of other sizes than is wanted."""
    (tmp_path / "drawn").mkdir()
    for number in (1, 2, 10, 11):
        Image.new("RGB", (40, 20), (number,) * 3).save(tmp_path / f"drawn/{number}.png")
    (tmp_path / "drawn/notes.md").write_text("no picture")
    return tmp_path / "drawn"


def lines(folder, text):
    (folder.parent / "prompts.txt").write_text(text)
    return folder.parent / "prompts.txt"


def test_pictures_are_in_natural_order_and_prompts_go_round(folder):
    found = read_pictures(folder, 16, lines(folder, "a {} on grass\n\na {} on snow\n"))
    assert found.images.shape == (4, 3, 16, 16) and found.prompts == ("a {} on grass", "a {} on snow")
    assert (found.images.mean((1, 2, 3)) * 255).round().tolist() == [1, 2, 10, 11]
    assert found.rule == "picture i in natural order has line i of prompts.txt, going round"


def test_the_centred_square_is_taken(tmp_path):
    image = torch.zeros(20, 40, 3, dtype=torch.uint8)
    image[:, 10:30] = 255
    for number in range(2):
        Image.fromarray(image.numpy()).save(tmp_path / f"{number}.png")
    found = read_pictures(tmp_path, 10, lines(tmp_path / "x", "a {}"))
    assert found.images.min() > 0.9  # the resampling reaches a little further


def test_a_picture_may_say_its_own_prompt(folder):
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text(f"a {{}} beside {path.stem}\n")
    (folder / "2.txt").unlink()
    said = PngImagePlugin.PngInfo()
    said.add_text("prompt", "a {} in two")
    Image.new("RGB", (20, 20)).save(folder / "2.png", pnginfo=said)
    found = read_pictures(folder, 16)
    assert found.prompts == ("a {} beside 1", "a {} in two", "a {} beside 10", "a {} beside 11")
    assert found.rule.startswith("each has its own")


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("a\nb\nc\n", "has 4 pictures for 3 prompts"),
        ("a\nb\nc\nd\ne\n", "has 4 pictures for 5 prompts"),
        ("\n", "--prompts: .* holds no prompt"),
        (None, "--pictures: .*1.png has no prompt: give one in 1.txt"),
    ],
)
def test_what_does_not_fit_is_refused(folder, text, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_pictures(folder, 16, text and lines(folder, text))


def test_folders_that_hold_none(folder, tmp_path):
    with pytest.raises(ValueError, match="--pictures: there is no folder"):
        read_pictures(tmp_path / "nowhere", 16)
    (tmp_path / "one").mkdir()
    (folder / "1.png").rename(tmp_path / "one/1.png")
    with pytest.raises(ValueError, match="has 1 picture, too few"):
        read_pictures(tmp_path / "one", 16)
    (folder / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2.png: cannot be read as an image"):
        read_pictures(folder, 16, lines(folder, "a {}"))


def test_a_prompt_may_lie_in_a_caption_file_and_is_one(folder):
    for path in folder.glob("*.png"):
        path.with_suffix(".caption").write_text(f"a {{}} beside {path.stem}\n")
    assert read_pictures(folder, 16).prompts[2] == "a {} beside 10"
    (folder / "2.caption").write_text("a {} on grass\na {} on snow\n")
    with pytest.raises(ValueError, match="2.caption has 2 lines: a picture has one prompt"):
        read_pictures(folder, 16)
