"""Runs of main.py: how they are started or resumed, and what they hold."""

from pathlib import Path


def words(entry: Path, run: Path) -> list[object]:
    """What a user types: resume what has begun, else start."""
    if (run / "config.yaml").is_file():
        return ["--resume", run, "-t"]
    return ["--base", entry, "-t", "--logdir", run]


def learned(folder: Path) -> dict[str, bytes]:
    """The concept files and pictures of a run, by relative path."""
    return {name: data for name, data in contents(folder).items() if name.endswith((".safetensors", ".png"))}


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder by relative path, but for locks and the logger's."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name != ".lock" and "tensorboard" not in path.relative_to(folder).parts
    }
