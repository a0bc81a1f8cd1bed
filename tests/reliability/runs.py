"""Runs of main.py: how they are started or gone on with, and whether two of them have done the same."""

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def words(entry: Path, run: Path) -> list[object]:
    """What a user types: go on where there is something to go on with, else start."""
    if (run / "config.yaml").is_file():
        return ["--resume", run, "-t"]
    return ["--base", entry, "-t", "--logdir", run]


def losses(run: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def equal(first: object, second: object) -> bool:
    """Whether two resume states hold the same; their pickles may name equal strings in other ways."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def assert_same(run: Path, other: Path) -> None:
    """The same files of the same bytes, and the losses logged but for steps that a kill followed."""
    found, wanted = contents(run), contents(other)
    assert found.keys() == wanted.keys()
    for name in wanted:
        if name.endswith(".ckpt"):
            assert equal(*(torch.load(folder / name, weights_only=True) for folder in (run, other))), name
        else:
            assert found[name] == wanted[name], name
    logged, steps = losses(run), losses(other)
    assert set(logged) <= set(steps) and logged == sorted(set(logged)) and len(logged) >= len(steps) - 2


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by relative path, but for locks and the logger's."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name != ".lock" and "tensorboard" not in path.relative_to(folder).parts
    }
