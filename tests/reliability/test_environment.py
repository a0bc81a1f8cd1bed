"""What the machine does to a command: disks that fill, folders that go, processes that die."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.conftest import heed_permissions
from tests.reliability.runs import contents, learned, words

ROOT = Path(__file__).parents[2]


def last_line(said: str) -> str:
    return said.rstrip().splitlines()[-1]


@pytest.mark.parametrize("size", [0, 4_000])
def test_a_disk_that_fills_while_training(launch, entry, whole, tmp_path, size):
    """The limit of a file's size lets pass nothing, or the config and concepts, but no state."""
    run = tmp_path / "run"
    ended = launch("main", *words(entry, run), file_size=size)
    assert ended.status == 2 and "Traceback" not in ended.said
    assert last_line(ended.said).startswith("error: ") and "make room" in last_line(ended.said)
    assert not list(tmp_path.rglob("*.partial"))
    finished = launch("main", *words(entry, run))
    assert finished.status == 0, finished.said
    assert learned(run) == learned(whole[0])


def test_a_disk_that_fills_later_leaves_the_last_state(launch, entry, whole, tmp_path):
    run = tmp_path / "run"
    launch("main", *words(entry, run), killed_at=25)
    before = torch.load(run / "models/last.ckpt", weights_only=True)["global_step"]
    ended = launch("main", *words(entry, run), file_size=3_000)
    assert ended.status == 2 and last_line(ended.said).endswith("make room; what was there before is unchanged")
    assert torch.load(run / "models/last.ckpt", weights_only=True)["global_step"] == before > 0
    launch("main", *words(entry, run))
    assert learned(run) == learned(whole[0])


COMMANDS: dict[str, tuple[str, str]] = {  # name -> module and flags
    "masks": ("data.soft_segment", "--image_dir OUT --super_class hat --model_weight pocket"),
    "samples": (
        "scripts.infusion_txt2img",
        "--config configs/backbone/pocket.yaml --prompt a --outdir OUT --steps 1 --n_samples 1 --device cpu",
    ),
    "conversion": ("scripts.convert_concept", "RUN/models/step=000006.safetensors OUT/new.safetensors"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_output_that_cannot_be_written(launch, whole, shelf, command, fault):
    shelf.chmod(0o755)
    shutil.copyfile(ROOT / "data/pocket/concepts/zigzag_hat/0.png", shelf / "0.png")
    (shelf / "0.png").chmod(0o644)
    before = contents(shelf)
    if fault == "read-only":
        shelf.chmod(0o555)
    how = {"file_size": 100} if fault == "full" else {"prepare": heed_permissions}
    module, flags = COMMANDS[command]
    ended = launch(module, *flags.replace("OUT", str(shelf)).replace("RUN", str(whole[0])).split(), **how)
    assert ended.status == 2, ended.said
    assert last_line(ended.said).startswith("error: ") and f"{shelf}" in last_line(ended.said)
    assert "Traceback" not in ended.said
    assert contents(shelf) == before


def at_step(number: int, event: Callable[[], None]) -> None:
    """Has something happen when so many optimiser steps are made."""
    from infusion.training.trainer import ConceptTrainer

    training_step = ConceptTrainer.training_step

    def wrapped(module: ConceptTrainer, *args: object) -> object:
        if module.global_step == number:
            event()
        return training_step(module, *args)

    ConceptTrainer.training_step = wrapped


def test_photos_that_vanish_while_training(launch, entry, whole, tmp_path):
    """They were encoded before the first step."""
    photos = shutil.copytree(entry.parent / "photos", tmp_path / "photos")
    vanish = partial(at_step, 2, partial(shutil.rmtree, photos, ignore_errors=True))
    run = tmp_path / "run"
    ended = launch("main", *words(entry, run), f"data_root={photos}", prepare=vanish)
    assert ended.status == 0 and not photos.exists(), ended.said
    assert learned(run) == learned(whole[0])


def test_a_photo_that_vanishes_while_the_photos_are_read(launch, entry, tmp_path):
    photos = shutil.copytree(entry.parent / "photos", tmp_path / "photos")
    run = tmp_path / "run"
    ended = launch("main", *words(entry, run), f"data_root={photos}", prepare=partial(lose, photos / "1.png"))
    assert ended.status == 2 and f"{photos}/1.png: cannot be read as an image" in last_line(ended.said)
    assert not run.exists()


def lose(photo: Path) -> None:
    """Removes a photo when the folder has been listed."""
    from PIL import Image

    opened = Image.open

    def vanishing(*args: object, **options: object) -> Image.Image:
        photo.unlink(missing_ok=True)
        return opened(*args, **options)

    Image.open = vanishing


@pytest.mark.slow
def test_one_of_two_processes_is_killed(entry, tmp_path):
    """The other ends with one line; both go on together to what two that are left alone learn."""
    flags = ["mask=none", "callbacks.samples=null", "trainer.max_steps=30"]
    two = ["--devices", "2", "--strategy", "ddp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "1700000000"}

    def start(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, ROOT / "main.py", *arguments, *two]
        return subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True, env=environment)

    alone, halted = tmp_path / "alone", tmp_path / "halted"
    first = start("--base", entry, "-t", "--logdir", alone, *flags)
    assert first.wait() == 0, first.stderr.read()
    second = start("--base", entry, "-t", "--logdir", halted, *flags)
    while second.poll() is None and not (halted / "models/step=000004.safetensors").exists():
        time.sleep(0.05)
    (child,) = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    said = second.communicate()[1]
    assert second.returncode == 2 and "Traceback" not in said
    assert last_line(said).startswith("error: another process of this run has ended")
    third = start("--resume", halted, "-t")
    assert third.wait() == 0, third.stderr.read()
    assert learned(halted) == learned(alone)
