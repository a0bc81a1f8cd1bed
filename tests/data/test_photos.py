import os
from pathlib import Path

import pytest
from PIL import Image
from pillow_heif import register_heif_opener

from data.photos import SUFFIXES, LeftOut, PhotoFolder

register_heif_opener()


def fill(folder: Path, names: list[str]) -> Path:
    """A folder of images, texts and, of names that end in a slash, folders."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif path.suffix in (".txt", ".caption", ".md", ".mov", ".DS_Store"):
            path.write_text("a cat")
        else:
            Image.new("RGB", (8, 8)).save(path, "PNG")
    return folder


IN_MASK = "neither photo, mask nor caption"
TAKEN: dict[str, tuple[list[str], list[tuple], list[LeftOut]]] = {  # files -> (photo, mask, caption), what is left out
    "masks in every place": (
        ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "mask/a.jpg", "mask/b.png", "c-masklabel.png", "mask/d.webp"],
        [("a.jpg", "mask/a.jpg", ""), ("b.jpg", "mask/b.png", ""), ("c.jpg", "c-masklabel.png", ""),
         ("d.jpg", "mask/d.webp", "")],
        [],
    ),
    "two masks": (
        ["a.jpg", "mask/a.jpg", "mask/a.png", "a-masklabel.png"],
        [("a.jpg", "mask/a.jpg", "")],
        [LeftOut("a-masklabel.png", "mask/a.jpg is used"), LeftOut("mask/a.png", "mask/a.jpg is used")],
    ),
    "captions of either ending": (
        ["a.jpg", "b.jpg", "a.txt", "b.caption"], [("a.jpg", "", "a.txt"), ("b.jpg", "", "b.caption")], [],
    ),
    "two captions": (
        ["a.jpg", "a.txt", "a.caption"], [("a.jpg", "", "a.txt")], [LeftOut("a.caption", "a.txt is used")],
    ),
    "of no photo": (
        ["a.jpg", "b.txt", "mask/b.png", "c-masklabel.png"],
        [("a.jpg", "", "")],
        [LeftOut("b.txt", "caption of no photo"), LeftOut("c-masklabel.png", "mask of no photo"),
         LeftOut("mask/b.png", "mask of no photo")],
    ),
    "folders below": (
        ["a.jpg", "10_sks dog/1.jpg", "10_sks dog/2.heic", "10_sks dog/mask/1.png", "x/y/1.cr2", "empty/"],
        [("a.jpg", "", "")],
        [LeftOut("10_sks dog/", "a folder of its own with 2 images: name it to use them", 2),
         LeftOut("empty/", "a folder without images"),
         LeftOut("x/y/", "a folder of its own with 1 images: name it to use them", 1)],
    ),
    "other files": (
        ["a.jpg", "a.mov", "notes.md", ".DS_Store", "._a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", "mask/x.md"],
        [("a.jpg", "", "")],
        [LeftOut("._a.jpg", "hidden", 1), LeftOut("a.mov", IN_MASK), LeftOut("mask/x.md", "not a mask"),
         LeftOut("notes.md", IN_MASK)],
    ),
    "previews": (["a.jpg", "mask/a.png", "mask/overlay/a.png"], [("a.jpg", "mask/a.png", "")], []),
    "every ending": ([f"{end[1:]}{end}" for end in SUFFIXES], [(f"{e[1:]}{e}", "", "") for e in sorted(SUFFIXES)], []),
    "capitals": (["A.JPG", "B.HEIC"], [("A.JPG", "", ""), ("B.HEIC", "", "")], []),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_taken_and_what_is_left_out(tmp_path, case):
    files, photos, left_out = TAKEN[case]
    found = PhotoFolder.read(fill(tmp_path, files))
    ours = [
        tuple(path.relative_to(tmp_path).as_posix() if path else "" for path in (one.path, one.mask, one.caption))
        for one in found.photos
    ]
    assert ours == photos and list(found.left_out) == left_out
    assert found.images_left_out == sum(one.images for one in left_out)
    assert all(one.name in found.report() and one.why in found.report() for one in left_out)


REFUSED: dict[str, tuple[list[str], str]] = {
    "one stem": (["a.jpg", "a.heic"], "a.heic and a.jpg in .* would share the mask and the caption"),
    "raw": (["a.jpg", "b.cr2"], "b.cr2: images of this kind cannot be read: convert it to PNG or JPEG"),
    "layers": (["a.jpg", "mask/a.psd"], "mask/a.psd: images of this kind cannot be read"),
    "a mask among the photos": (["a.jpg", "a_mask.png"], "a_mask.png: looks like the mask of a.jpg: move it to mask/a"),
    "only below": (["10_sks dog/1.jpg"], "holds no image; 10_sks dog/ in it has 1: name that folder"),
    "nothing": (["notes.md"], r"holds no image \(.png, "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, case):
    files, says = REFUSED[case]
    with pytest.raises(ValueError, match=says):
        PhotoFolder.read(fill(tmp_path, files))


def test_the_account_counts_by_place(tmp_path):
    files = ["a.jpg", "b.jpg", "c.jpg", "mask/a.png", "b-masklabel.png", "a.txt", "b.caption", "c.txt", "n.md", "o.md"]
    said = "3 photos; masks: 1 in -masklabel.png, 1 in mask/; captions: 1 in .caption, 2 in .txt"
    found = PhotoFolder.read(fill(tmp_path, files))
    assert found.report() == f"{said}; left out: n.md, o.md (neither photo, mask nor caption)"
    for number in range(9):
        (tmp_path / f"p{number}.md").touch()
    assert "n.md, o.md, p0.md, p1.md, p2.md, p3.md and 5 more (neither" in PhotoFolder.read(tmp_path).report()


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "a.json", "META.CSV"])
def test_captions_in_the_layout_of_other_tools_are_told_where_they_belong(tmp_path, name):
    (one,) = PhotoFolder.read(fill(tmp_path, ["a.jpg", name])).left_out
    assert one == LeftOut(name, "captions are read from <photo>.txt or .caption")


def test_pipes_and_dead_links(tmp_path):
    fill(tmp_path, ["a.jpg"])
    for name in ("x.png", "a.txt"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    found = PhotoFolder.read(tmp_path)
    assert [photo.path.name for photo in found.photos] == ["a.jpg", "b.png"]  # whoever reads b.png will name it
    assert [one.name for one in found.left_out] == ["a.txt", "x.png"]
