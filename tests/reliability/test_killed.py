"""A training that is killed at any moment, twice in a row, ends in the same concepts as one that is not."""

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from ldm.util.files import locked
from tests.reliability.runs import contents, learned, words


def finish(launch, entry: Path, folder: Path) -> None:
    ended = launch("main", *words(entry, folder))
    assert ended.status == 0, ended.said


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_a_run_killed_twice_at_any_moment_ends_in_the_same_concepts(launch, entry, whole, tmp_path, seed):
    folder, seconds = whole
    moments = [random.Random(f"{seed} {i}").uniform(0.1, seconds) for i in range(2)]
    for moment in moments:
        launch("main", *words(entry, tmp_path / "halted"), kill_after=moment)
    finish(launch, entry, tmp_path / "halted")
    assert learned(tmp_path / "halted") == learned(folder)


@pytest.mark.parametrize("number", [0, 3, 8, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 5, 20))])
def test_a_run_killed_while_it_writes_ends_in_the_same_concepts(launch, entry, whole, tmp_path, number):
    """The process dies before its nth call that puts a file on the disk, or gives it its name."""
    halted = tmp_path / "halted"
    for time in range(2):
        before = {name: data for name, data in contents(halted).items() if "partial" not in name}
        ended = launch("main", *words(entry, halted), killed_at=number)
        assert ended.status == -signal.SIGKILL or time and ended.status == 0
        after = contents(halted)
        for name, data in before.items():  # what is rewritten is whole
            if name.endswith(".safetensors") or name.endswith(".png"):
                assert after[name] == data
            elif name.endswith(".ckpt") and name in after:
                assert torch.load(halted / name, weights_only=True)["global_step"] > 0
    finish(launch, entry, halted)
    assert learned(halted) == learned(whole[0])


def test_a_run_is_resumed_from_a_state_before_the_last(launch, whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/models/last.ckpt").write_bytes(b"torn")
    ended = launch("main", "--resume", tmp_path / "copy", "-t")
    assert ended.status == 2 and "last.ckpt is not a resume state, or damaged" in ended.said
    ended = launch("main", "--resume", tmp_path / "copy/models/step=000004.ckpt", "-t")
    assert ended.status == 0, ended.said
    assert learned(tmp_path / "copy") == learned(folder)


def test_a_longer_run_is_a_run_and_what_is_added_to_it(launch, entry, tmp_path):
    """Steps that follow a finished run draw what they would have drawn in one."""
    long, short = tmp_path / "long", tmp_path / "short"
    launch("main", *words(entry, long))
    launch("main", *words(entry, short), "trainer.max_steps=4")
    ended = launch("main", *words(entry, short), "trainer.max_steps=6")
    assert ended.status == 0, ended.said
    for name in ("models/step=000006.safetensors", "images/step=000006.png"):
        assert (short / name).read_bytes() == (long / name).read_bytes()


def test_two_runs_do_not_share_a_folder(launch, entry, tmp_path):
    run = tmp_path / "run"
    launch("main", *words(entry, run), killed_at=20)
    with locked(run):
        before = contents(run)
        ended = launch("main", *words(entry, run))
        assert ended.status == 2
        assert ended.said.splitlines()[-1].startswith(f"error: {run}: another process is at work in this folder")
        assert contents(run) == before
    finish(launch, entry, run)
