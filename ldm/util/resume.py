"""Resume states: everything that a training which was killed at any moment needs to end in the same bytes.

Beside what Lightning keeps (weights, optimisers, schedules, the loss scaler, step and position inside the epoch, the
callbacks' records) that is the state of the random generators. A state is written between two optimiser steps, so that
no accumulated gradient is ever lost with one.
"""

import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.util.dist import everyone
from ldm.util.files import replacing
from ldm.util.signals import SAVE, Signals, Stopped

LAST = "last.ckpt"
logger = logging.getLogger(__name__)


class StateFile(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Raises OSError for what the system does not allow, such as a full disk."""
        with replacing(Path(path)) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # how PyTorch closes an archive that could not be written
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise


class ResumeState(pl.Callback):
    """Writes `models/last.ckpt`, and obeys signals. The last of the callbacks: a state has what they did at its step.

    The state of the end is written when all else is: whoever was killed before it does the last steps once more.

    Args:
        every: optimiser steps between two states.
        keep: how many of the last states there are: beside `last.ckpt`, `step=000400.ckpt` and so on, itself included.
        signals: what asks for more of them, or for an end.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, every: int = 500, keep: int = 1, signals: Signals | None = None) -> None:
        for name, number in {"save_every": every, "keep": keep}.items():
            if number < 1:
                raise ValueError(f"{name}: must be at least 1, not {number}")
        self.every, self.keep = every, keep
        self.signals = Signals() if signals is None else signals
        self._random: list[dict[str, Any]] | None = None  # to be restored, by process
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"random": everyone(random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = state_dict["random"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self.signals.start()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, _: int) -> None:
        if self._random is not None and len(self._random) == trainer.world_size:
            set_random_state(self._random[trainer.global_rank])  # after the loader, which draws a seed when it begins
        self._random = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Raises `Stopped` once a state is written, where a signal asked for an end."""
        if trainer.global_step == self._step:  # between the micro-batches of one optimiser step
            return
        self._step = trainer.global_step
        asked = torch.tensor([self.signals.stop, self.signals.save], device=trainer.strategy.root_device).float()
        stop, save = (trainer.strategy.reduce(asked, reduce_op="sum") > 0).tolist()  # of any process
        if ends(trainer):
            return
        if self._step % self.every == 0 or stop or save:
            self._write(trainer)
        if save:
            self.signals.save = False
            if self.signals.requeue is not None:
                self.signals.requeue(SAVE, None)
            logger.info("saved at step %d", self._step)
        if stop:
            raise Stopped

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        folder = Path(trainer.default_root_dir) / "models"
        for one in trainer.loggers:
            if isinstance(one, TensorBoardLogger):
                one.experiment.flush()
        numbered = folder / f"step={trainer.global_step:06d}.ckpt"
        trainer.save_checkpoint(numbered if self.keep > 1 else folder / LAST, weights_only=False)
        if not trainer.is_global_zero:
            return
        for old in states(folder)[self.keep if self.keep > 1 else 0 :]:
            old.unlink()
        if self.keep > 1:
            with replacing(folder / LAST) as partial:
                same_file(numbered, partial)
        for requeued in Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"):  # Lightning would prefer it
            requeued.unlink()


def ends(trainer: pl.Trainer) -> bool:
    """Whether training ends with the step just done."""
    epochs = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
    return trainer.global_step == trainer.max_steps or trainer.should_stop or (trainer.is_last_batch and epochs)


def states(folder: Path) -> list[Path]:
    """The numbered states in a folder, the last first."""
    return sorted(folder.glob("step=*.ckpt"), reverse=True)


def same_file(file: Path, name: Path) -> None:
    """Gives a file a second name, or a copy on a file system that has no such thing."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def random_state() -> dict[str, Any]:
    """The random generators of Python, NumPy and PyTorch, as what `torch.load` reads without pickled code."""
    name, words, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (name, words.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Sets what `random_state` gave; CUDA's where there are as many devices."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
