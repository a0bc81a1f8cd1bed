"""Photos, masks and captions of every kind in the folders that commands read."""

import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.dataset import ConceptImages
from ldm.util.config import ROOT
from tests.bad_input.bench import Bench

RED = (230, 20, 10)
TRAIN = [
    *("--base", ROOT / "configs/pocket_demo.yaml", "-t", "--logdir", "FOLDER/run", "data_root=FOLDER/photos"),
    *("mask=none", "callbacks.samples=null", "trainer.max_steps=1", "trainer.enable_progress_bar=false"),
]
SEGMENT = ["--image_dir", "FOLDER/photos", "--super_class", "dog", "--model_weight", "pocket", "--device", "cpu"]
METRICS = ["--personalized_ckpt", "CONCEPT", "--images", "FOLDER/photos", "--metrics", "clip_i", "--out", "FOLDER/out"]
READERS = {"main.py": TRAIN, "soft_segment": SEGMENT, "metrics": [*METRICS, "--samples", "1", "--device", "cpu"]}


def photo(path: Path, size: tuple[int, int] = (64, 64), **options: object) -> Path:
    Image.new("RGB", size, RED).save(path, **options)
    return path


def header_only(path: Path, width: int, height: int) -> None:
    """A PNG whose header promises this size, and that holds next to nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))


def truncated(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def loop(path: Path) -> None:
    path.symlink_to(path.with_name("other.png"))
    path.with_name("other.png").symlink_to(path)


UNREADABLE: dict[str, tuple[str, Callable[[Path], object]]] = {  # name of the file, and what makes it
    "empty": ("a.png", Path.touch),
    "truncated png": ("a.png", truncated),
    "truncated jpeg": ("a.jpg", truncated),
    "truncated heic": ("a.heic", truncated),
    "truncated avif": ("a.avif", truncated),
    "html": ("a.jpg", lambda path: path.write_text("<!doctype html><title>404</title>")),
    "too large a header": ("a.png", lambda path: header_only(path, 60_000, 60_000)),
    "size of nothing": ("a.png", lambda path: header_only(path, 0, 10)),
    "bomb": ("a.png", lambda path: Image.new("1", (16_000, 16_000)).save(path)),
    "loop": ("a.png", loop),
    "broken link": ("a.png", lambda path: path.symlink_to(path.with_name("gone.png"))),
    "long name": (f"{'é' * 120}.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n")),
    "control characters in the name": ("a\n\x1b[31mb.png", Path.touch),
}


@pytest.fixture
def photos(bench: Bench) -> Path:
    (bench.folder / "photos").mkdir()
    return bench.folder / "photos"


UNREAD = [("soft_segment", case) for case in UNREADABLE]
UNREAD += [(command, case) for command in ("main.py", "metrics") for case in ("truncated jpeg", "broken link")]


@pytest.mark.parametrize(("command", "case"), UNREAD)
def test_an_image_that_cannot_be_read_is_named(bench, photos, command, case):
    name, make = UNREADABLE[case]
    photo(photos / "good.png")
    make(photos / name)
    bench.refuse(command, *READERS[command], says=name[-8:])


FOLDERS: dict[str, Callable[[Path], object]] = {
    "no folder": Path.rmdir,
    "a file": lambda path: (path.rmdir(), path.write_text("photos")),
    "empty": lambda path: None,
    "folder called as an image": lambda path: (path / "cat.png").mkdir(),
    "pipe": lambda path: os.mkfifo(path / "x.png"),
    "hidden": lambda path: photo(path / ".a.png"),
    "another ending": lambda path: photo(path / "a.ppm"),
}
WITHOUT = [("soft_segment", case) for case in FOLDERS] + [(command, "empty") for command in ("main.py", "metrics")]


@pytest.mark.parametrize(("command", "case"), WITHOUT)
def test_a_folder_without_an_image_is_named(bench, photos, command, case):
    FOLDERS[case](photos)
    bench.refuse(command, *READERS[command], says=str(photos))


@pytest.mark.parametrize("command", READERS)
def test_a_photo_or_folder_without_permission_is_named(bench, photos, as_nobody, command):
    photo(photos / "good.png")
    photo(photos / "mine.png").chmod(0)
    with as_nobody():
        bench.refuse(command, *READERS[command], says="mine.png")
    photos.chmod(0)
    with as_nobody():
        bench.refuse(command, *READERS[command], says=str(photos))
    photos.chmod(0o755)


READABLE: dict[str, tuple[str, Callable[[Path], object]]] = {  # modes of images are tested in `test_dataset.py`
    "one pixel": ("a.png", lambda path: photo(path, (1, 1))),
    "a strip": ("a.png", lambda path: photo(path, (30_000, 10))),
    "wrong ending": ("a.png", lambda path: photo(path, format="JPEG")),
    "unicode": ("ねこ \u202e🐈.png", photo),
    "250 bytes": (f"{'é' * 123}.png", photo),
    "link": ("a.png", lambda path: path.symlink_to(photo(path.parent.parent / "elsewhere.png"))),
    "capital ending": ("a.JPEG", lambda path: photo(path, format="PNG")),
}


@pytest.mark.parametrize("case", READABLE)
def test_an_odd_image_is_read_as_what_it_shows(photos, case):
    name, make = READABLE[case]
    make(photos / name)
    images = ConceptImages(photos, 16, "dog", mask="none")
    wanted = torch.tensor(RED).view(3, 1, 1).expand(3, 16, 16)
    assert images.names == [name]
    torch.testing.assert_close((images[0][0] + 1) * 127.5, wanted.float(), atol=4, rtol=0)


@pytest.mark.parametrize("case", ["unicode", "250 bytes", "a strip", "one pixel"])
def test_an_odd_image_gets_a_mask(bench, photos, case):
    name, make = READABLE[case]
    make(photos / name)
    bench.work("soft_segment", *SEGMENT)
    mask = Image.open(photos / "mask" / f"{Path(name).stem}.png")
    assert mask.size == Image.open(photos / name).size and mask.mode == "L"


@pytest.mark.parametrize("kind", ["png", "gif", "webp"])
def test_of_an_animation_the_first_frame_is_taken_with_a_warning(bench, photos, kind):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("white", "black")]
    frames[0].save(photos / f"a.{kind}", save_all=True, append_images=frames[1:])
    found = bench.work("main.py", *TRAIN[:2], *TRAIN[3:])
    assert f"warning: {photos / 'a'}.{kind}: is an animation, of which the first frame is taken\n" in found.err
    assert ConceptImages(photos, 16, "dog", mask="none")[0][0].min() > 0.99


def test_neither_folders_nor_pipes_are_taken_for_photos(photos):
    photo(photos / "good.png")
    (photos / "cat.png").mkdir()
    os.mkfifo(photos / "x.png")
    os.mkfifo(photos / "good.txt")
    assert ConceptImages(photos, 16, "dog", mask="none").names == ["good.png"]


def test_memory_does_not_grow_with_the_number_of_photos(photos):
    """5,000 photos: all of them at once in float32 would take 61 MB at 32 pixels, and 15.7 GB at 512."""
    photo(photos / "0.png")
    for number in range(1, 5000):
        os.link(photos / "0.png", photos / f"{number}.png")
    tracemalloc.start()
    images = ConceptImages(photos, 32, "dog", mask="none")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(images) == 5000 and most < 10e6
    assert images[4999][0].shape == (3, 32, 32)


def grey(value: float, size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.new("L", size, value)


def floats(value: float) -> Image.Image:
    values = np.ones((40, 60), np.float32)
    values[0, 0] = value
    return Image.fromarray(values)


def corner(path: Path) -> None:
    """White where the centred square does not reach."""
    mask = grey(0)
    mask.paste(255, (0, 0, 8, 40))
    mask.save(path)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {  # what makes the mask, and what is said of it
    "missing": (lambda path: None, "0.png: has no mask; make masks by"),
    "pipe": (os.mkfifo, "0.png: has no mask"),
    "truncated": (truncated, "mask/0.png: cannot be read as an image"),
    "turned": (lambda path: grey(255, (40, 60)).save(path), "mask/0.png: 40×60 is not the shape of 0.png, 60×40"),
    "another shape": (lambda path: grey(255, (60, 60)).save(path), "mask/0.png: 60×60 is not the shape"),
    "black": (lambda path: grey(0).save(path), "mask/0.png: the mask is empty"),
    "black in the square": (corner, "mask/0.png: only 0% of the mask lies in the square that would be used: set crop"),
    "nan": (lambda path: floats(float("nan")).save(path, "TIFF"), "mask/0.png: cannot be read as an image: it holds"),
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
    bench.refuse("main.py", *(word for word in TRAIN if word != "mask=none"), "crop=middle", says=says)


@pytest.mark.parametrize("case", ["truncated", "nan"])
def test_a_mask_that_is_there_must_be_readable_to_be_kept(bench, mask, case):
    make, says = REFUSED[case]
    make(mask)
    bench.refuse("soft_segment", *SEGMENT, says=says)


TAKEN: dict[str, Callable[[Path], object]] = {
    "faint": lambda path: grey(1).save(path),  # divided by its maximum
    "smaller": lambda path: grey(200, (30, 20)).save(path),
    "a pixel off": lambda path: grey(200, (59, 40)).save(path),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_mask_of_one_value_is_one_everywhere(mask, case):
    TAKEN[case](mask)
    masked = ConceptImages(mask.parents[1], 16, "dog")
    torch.testing.assert_close(masked[0][1], torch.ones(1, 16, 16))
    assert masked.report().endswith("masks (1 in mask/) cover 100% of it, 100% on average")


CAPTIONS: dict[str, tuple[bytes, str]] = {
    "binary": (bytes(range(256)), "0.txt: cannot be read as text"),
    "utf-16 without a mark": ("a dög\n".encode("utf-16-le"), "0.txt: cannot be read as text: save it as UTF-8"),
    "the noun beyond what is read": (b"\n" + b"red " * 90 + b"dog", "0.txt:2: {} in 'red red "),
    "a plural": (b"a dog\n\nsome {}s\n", "0.txt:3: {} in 'some {}s' is glued to its neighbours"),
    "braces": (b"\na dog {dog}\n", "0.txt:2: 'a dog {dog}' has other braces than {}"),
    "10 MB": (b"a dog\n" * 1_700_000, "0.txt: is larger than 100,000 bytes"),
}


@pytest.mark.parametrize("case", ["utf-16", "utf-32", "utf-8-sig"])
def test_captions_of_windows_are_read(photos, case):
    photo(photos / "0.png")
    (photos / "0.txt").write_bytes("a dog in Zürich\r\n".encode(case))
    ((caption,),) = ConceptImages(photos, 16, "dog", mask="none").captions
    assert caption.template == "a {} in Zürich" and caption.place == f"{photos / '0.txt'}:1"


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_that_make_no_sense_are_named(bench, photos, case):
    content, says = CAPTIONS[case]
    photo(photos / "0.png")
    (photos / "0.txt").write_bytes(content)
    bench.refuse("main.py", *TRAIN, says=says)
