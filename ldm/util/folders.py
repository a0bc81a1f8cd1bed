"""Names in a run folder, and what can be said of one without opening what is in it."""

import os
from pathlib import Path

CONFIG, STATE = "config.yaml", "models/last.ckpt"


def is_run(folder: str | Path) -> bool:
    """Whether a run has begun in a folder."""
    return (Path(folder) / CONFIG).is_file()


def folder_of(resume: str) -> Path:
    """The run folder, of itself or of a state in it."""
    named = Path(resume)
    return named.parent.parent if named.suffix == ".ckpt" else named


def requeued(logdir: str | None) -> bool:
    """Whether SLURM has started the same command once more, for a run that has begun in `logdir`."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0 and logdir is not None and is_run(logdir)
