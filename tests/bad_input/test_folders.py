"""What a folder of photos holds and what of it is left out: every command says the same and refuses the same."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pillow_heif import register_heif_opener

from ldm.util.config import ROOT
from tests.bad_input.bench import Bench, Outcome
from tests.bad_input.test_images import SEGMENT, TRAIN

register_heif_opener()
MEASURE = ["--metrics", "clip_i", "--samples", "2", "--steps", "1", "--device", "cpu", "--out", "FOLDER/out"]
BUILD = [word for word in TRAIN if word != "-t"]  # everything is built and reported, and nothing is trained
MANY = ["concepts=[{name: dog, superclass: dog, data_root: FOLDER/photos}]", "trainer.enable_progress_bar=false"]
EXPERIMENT = """
subjects: {dog: {folder: PHOTOS, superclass: dog}}
variants: {demo: ROOT/configs/pocket_demo.yaml}
"""
COMMANDS: dict[str, list] = {  # that read a folder of photos
    "main.py": BUILD,
    "many": ["--base", ROOT / "configs/pocket_many.yaml", "--logdir", "FOLDER/run", *MANY, "mask=none"],
    "soft_segment": SEGMENT,
    "metrics": ["--personalized_ckpt", "CONCEPT", "--images", "FOLDER/photos", *MEASURE],
    "pictures": ["--config", ROOT / "configs/backbone/pocket.yaml", "--pictures", "row=FOLDER/photos", "--superclass",
                 "dog", "--images", "FOLDER/photos", "--prompts", "FOLDER/prompts.txt", *MEASURE],
    "experiment": ["FOLDER/experiment.yaml", "--only", "nothing"],
}  # fmt: skip
MODULES = {"many": "main.py", "pictures": "metrics"}


@pytest.fixture
def photos(bench: Bench) -> Path:
    """Two photos, and what the commands need beside them."""
    folder = bench.folder / "photos"
    folder.mkdir()
    for number in (1, 2):
        image(folder / f"{number}.png")
    (bench.folder / "prompts.txt").write_text("a photo of a {}")
    said = EXPERIMENT.replace("PHOTOS", str(folder)).replace("ROOT", str(ROOT))
    (bench.folder / "experiment.yaml").write_text(said)
    return folder


def image(path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def run(bench: Bench, command: str) -> Outcome:
    return bench.run(MODULES.get(command, command), *COMMANDS[command])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "raw": (lambda photos: (photos / "3.cr2").touch(), "3.cr2: images of this kind cannot be read"),
    "broken heic": (lambda photos: (photos / "3.heic").write_bytes(b"ftypheic"), "3.heic: cannot be read as an image"),
    "one stem": (lambda photos: image(photos / "1.jpg"), "1.jpg and 1.png in"),
    "a mask among them": (lambda photos: image(photos / "1_mask.png"), "1_mask.png: looks like the mask of 1.png"),
    "only below": (lambda photos: photos.rename(photos.with_name("10_sks dog"))
                   and (photos.mkdir(), photos.with_name("10_sks dog").rename(photos / "10_sks dog")),
                   "holds no image; 10_sks dog/ in it has 2: name that folder"),
}  # fmt: skip


OPENED = [(command, case) for command in COMMANDS for case in REFUSED]
OPENED.remove(("experiment", "broken heic"))  # whose tasks are the first to open a photo


@pytest.mark.parametrize(("command", "case"), OPENED)
def test_what_cannot_be_taken_is_refused_by_all(bench, photos, command, case):
    make, says = REFUSED[case]
    make(photos)
    bench.refuse(MODULES.get(command, command), *COMMANDS[command], says=says)


LEFT_OUT: dict[str, tuple[Callable[[Path], object], str]] = {
    "kohya's folder": (lambda photos: image(photos / "10_sks dog/1.png"), "10_sks dog/ (a folder of its own with 1 im"),
    "a caption": (lambda photos: (photos / "3.caption").touch(), "3.caption (caption of no photo)"),
    "a mask": (lambda photos: image(photos / "mask/3.png"), "mask/3.png (mask of no photo)"),
    "a video": (lambda photos: (photos / "1.mov").touch(), "1.mov (neither photo, mask nor caption)"),
    "hidden": (lambda photos: image(photos / ".3.png"), ".3.png (hidden)"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_left_out_is_named_by_all(bench, photos, command):
    for make, _ in LEFT_OUT.values():
        make(photos)
    found = run(bench, command)
    said = found.out + found.err
    assert "left out: " in said and all(says in said for _, says in LEFT_OUT.values()), said


@pytest.mark.parametrize("suffix", ["jfif", "avif", "heic"])
@pytest.mark.parametrize("command", ["main.py", "soft_segment"])
def test_photos_of_phones_and_browsers_are_photos(bench, photos, command, suffix):
    format = {"jfif": "JPEG", "avif": "AVIF", "heic": "HEIF"}[suffix]
    image(photos / f"3.{suffix}", format=format)
    found = run(bench, command)
    assert found.status == 0 and "3 photos" in found.out + found.err, found.err
    assert command == "main.py" or Image.open(photos / "mask/3.png").size == (64, 64)


def test_the_report_counts_photos_that_were_used_and_left_out(bench, photos):
    image(photos / "more/1.png")
    image(photos / "more/2.png")
    assert run(bench, "pictures").status == 0
    (row,) = json.loads((bench.folder / "out/metrics.json").read_text())["methods"].values()
    assert (row["photos_used"], row["photos_left_out"], row["photos_crop"]) == (2, 2, "subject")
    assert (row["pictures_used"], row["pictures_left_out"]) == (2, 2)
