"""Images of every kind in the folders that commands read."""

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
from tests.bad_input.bench import Bench, nobody

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
    "text": ("a.png", lambda path: path.write_text("a photo of a cat\n" * 100)),
    "html": ("a.jpg", lambda path: path.write_text("<!doctype html><title>404</title>")),
    "too large a header": ("a.png", lambda path: header_only(path, 60_000, 60_000)),
    "size of nothing": ("a.png", lambda path: header_only(path, 0, 10)),
    "bomb": ("a.png", lambda path: Image.new("1", (16_000, 16_000)).save(path)),
    "loop": ("a.png", loop),
    "broken link": ("a.png", lambda path: path.symlink_to(path.with_name("gone.png"))),
    "svg": ("a.png", lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")),
    "long name": (f"{'é' * 120}.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n")),
    "control characters in the name": ("a\n\x1b[31mb.png", Path.touch),
}


@pytest.fixture
def photos(bench: Bench) -> Path:
    (bench.folder / "photos").mkdir()
    return bench.folder / "photos"


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("command", READERS)
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


@pytest.mark.parametrize("case", FOLDERS)
@pytest.mark.parametrize("command", READERS)
def test_a_folder_without_an_image_is_named(bench, photos, command, case):
    FOLDERS[case](photos)
    bench.refuse(command, *READERS[command], says=str(photos))


@pytest.mark.parametrize("command", READERS)
def test_a_photo_without_permission_is_named(bench, photos, command):
    photo(photos / "good.png")
    photo(photos / "mine.png").chmod(0)
    bench.open_to_all()
    with nobody():
        bench.refuse(command, *READERS[command], says="mine.png")


@pytest.mark.parametrize("command", READERS)
def test_a_folder_without_permission_is_named(bench, photos, command):
    photo(photos / "good.png")
    bench.open_to_all()
    photos.chmod(0)
    with nobody():
        bench.refuse(command, *READERS[command], says=str(photos))
    photos.chmod(0o755)


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(path)


def transparent(path: Path) -> None:
    """Half of the way from white."""
    Image.new("RGBA", (64, 64), (*RED, 128)).save(path)


READABLE: dict[str, tuple[str, Callable[[Path], object], tuple[int, ...], float]] = {  # and colour, deviation
    "one pixel": ("a.png", lambda path: photo(path, (1, 1)), RED, 0),
    "a strip": ("a.png", lambda path: photo(path, (30_000, 10)), RED, 0),
    "wrong ending": ("a.png", lambda path: photo(path, format="JPEG"), RED, 4),
    "png called jpg": ("a.jpg", lambda path: photo(path, format="PNG"), RED, 0),
    "cmyk jpeg": ("a.jpg", lambda path: Image.new("CMYK", (64, 64), (20, 230, 240, 5)).save(path), (230, 24, 15), 6),
    "cmyk tiff": ("a.tif", lambda path: Image.new("CMYK", (64, 64), (20, 230, 240, 5)).save(path), (230, 24, 15), 1),
    "sixteen bits": ("a.png", sixteen_bits, (156, 156, 156), 1),
    "half transparent": ("a.png", transparent, (242, 137, 132), 1),
    "palette": ("a.gif", lambda path: Image.new("RGB", (64, 64), RED).convert("P").save(path), (255, 0, 0), 30),
    "one bit": ("a.png", lambda path: Image.new("1", (64, 64), 1).save(path), (255, 255, 255), 0),
    "unicode": ("ねこ \u202e🐈.png", photo, RED, 0),
    "250 bytes": (f"{'é' * 123}.png", photo, RED, 0),
    "link": ("a.png", lambda path: path.symlink_to(photo(path.parent.parent / "elsewhere.png")), RED, 0),
    "capital ending": ("a.JPEG", lambda path: photo(path, format="PNG"), RED, 0),
}


@pytest.mark.parametrize("case", READABLE)
def test_an_odd_image_is_read_as_what_it_shows(photos, case):
    name, make, colour, deviation = READABLE[case]
    make(photos / name)
    images = ConceptImages(photos, 16, "dog", mask="none")
    wanted = torch.tensor(colour).view(3, 1, 1).expand(3, 16, 16)
    assert images.names == [name]
    torch.testing.assert_close((images[0][0] + 1) * 127.5, wanted.float(), atol=deviation + 1e-3, rtol=0)


@pytest.mark.parametrize("case", ["unicode", "250 bytes", "a strip", "one pixel", "cmyk jpeg"])
def test_an_odd_image_gets_a_mask(bench, photos, case):
    name, make, *_ = READABLE[case]
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
