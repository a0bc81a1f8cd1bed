"""Run folders: one training each, which can be killed at any moment and go on."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from pickle import UnpicklingError

from ldm.util.errors import UserError
from ldm.util.files import holds_work, locked, write

CONFIG, STATE = "config.yaml", "models/last.ckpt"


def new_folder(logdir: str | None, basedir: str, name: str) -> Path:
    """The folder of a new run: `logdir`, or `<basedir>/<time>_<name>`, with a number behind it where that is taken.

    Raises:
        UserError: there is something in `logdir`.
    """
    if logdir is None:
        name = f"{datetime.now():%Y-%m-%dT%H-%M-%S}_{name}"
        names = (name if number == 1 else f"{name}-{number}" for number in count(1))
        return next(folder for folder in (Path(basedir) / name for name in names) if not folder.exists())
    folder = Path(logdir)
    if (holds_work(folder) and not rank()) or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--logdir: {folder} exists already; go on with it by --resume {folder}, or name another")
    return folder


def is_run(folder: str | Path) -> bool:
    """Whether a run has begun in a folder."""
    return (Path(folder) / CONFIG).is_file()


def folder_of(resume: str) -> Path:
    """The run folder, of itself or of a state in it."""
    named = Path(resume)
    return named.parent.parent if named.suffix == ".ckpt" else named


def resume_state(resume: str) -> tuple[Path | None, int]:
    """The state that a run goes on from and its step; None and 0 for a run that was killed before its first state.

    Raises:
        UserError: it cannot be read.
    """
    import torch  # seconds

    from ldm.util.resume import states

    named = Path(resume)
    path = named if named.suffix == ".ckpt" else named / STATE
    if path != named and not path.exists():
        return None, 0
    try:
        return path, torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, UnpicklingError) as error:
        others = [str(other) for other in states(path.parent) if other != path]
        advice = f"go on from an older state by --resume {others[0]}" if others else "begin anew in another folder"
        raise UserError(f"--resume: {path} is no resume state, or damaged; {advice}") from error


@contextmanager
def at_work(folder: Path, config: str) -> Iterator[None]:
    """Has a run folder to itself and writes its config; of a run that fails before it began, nothing is left.

    Raises:
        UserError: another process is at work in it.
    """
    if rank():  # the first process has it for all
        yield
        return
    new = not holds_work(folder)
    with locked(folder):
        try:
            if not is_run(folder):
                write(folder / CONFIG, config.encode())
            yield
        except (UserError, ValueError, OSError):
            if new and not (folder / "models").exists():
                shutil.rmtree(folder)
            raise


def rank() -> int:
    """Which of a run's processes this is."""
    from pytorch_lightning.utilities import rank_zero_only  # seconds

    return rank_zero_only.rank
