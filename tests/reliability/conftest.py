"""A run that nothing happens to, and commands to which something does."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import draw_photos
from tests.reliability.processes import PRELOADED, Ended, Faults, Output, run_command
from tests.reliability.runs import contents, words

ROOT = Path(__file__).parents[2]
LIMIT = 120  # seconds, for a process that hangs
ENTRY = """
include: [tiny.yaml, ROOT/configs/method/infusion.yaml, ROOT/configs/data/photos.yaml]
superclass: cat
data_root: PHOTOS
batch_size: 2
trainer: {max_steps: 6, accumulate_grad_batches: 2, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 1}
callbacks:
  concept: {params: {every: 2}}
  samples: {params: {every: 3, steps: 2}}
save_every: 1
keep: 3
"""


@pytest.fixture(scope="session")
def server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    first = context.Process(target=int)  # waits for the imports
    first.start()
    first.join()
    return context


@pytest.fixture(scope="session")
def launch(server) -> Callable[..., Ended]:
    """Runs a command's module in a process, which is killed after some seconds if it has not ended by then."""

    def run(module: str, *words: object, kill_after: float | None = None, **faults: Any) -> Ended:
        output = Output()
        arguments = (module, [str(word) for word in words], Faults(**faults))
        process = server.Process(target=run_command, args=(*arguments, output))
        started = time.monotonic()
        process.start()
        process.join(LIMIT if kill_after is None else kill_after)
        hangs = process.is_alive() and kill_after is None
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        said = output.text()
        assert not hangs, f"{module} did not end within {LIMIT} s: {said}"
        return Ended(process.exitcode, said, time.monotonic() - started)

    return run


@pytest.fixture(scope="session")
def entry(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("entry")
    text = ENTRY.replace("ROOT", str(ROOT))
    shutil.copyfile(tiny, folder / "tiny.yaml")
    path = folder / "entry.yaml"
    path.write_text(text.replace("PHOTOS", str(draw_photos(folder / "photos"))))
    return path


@pytest.fixture(scope="session")
def whole(launch: Callable[..., Ended], entry: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a run that nothing happens to, and how many seconds it took."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    ended = launch("main", *words(entry, folder))
    assert ended.status == 0, ended.said
    states = ["models/last.ckpt", *(f"models/step={step:06d}.ckpt" for step in (4, 5, 6))]
    concepts = [f"models/step={step:06d}.safetensors" for step in (2, 4, 6)]
    images = [f"images/step={step:06d}.png" for step in (3, 6)]
    assert sorted(contents(folder)) == sorted(["config.yaml", "photos.png", *states, *concepts, *images])
    return folder, ended.seconds
