"""A training run: its folder, its resume state, its log, and how it ends.

A run folder holds `config.yaml` (resolved), `models/last.ckpt` (the resume state), `tensorboard/`, and what the
callbacks of the config write. A state is written between two optimiser steps, so that no accumulated gradient is lost.
Concept training draws from (seed, step) alone: a state needs no random generators.
"""

import logging
import math
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.tensorboard.summary import hparams

from ldm.util.cli import UserError, check_range
from ldm.util.files import holds_work, locked, replacing, write
from ldm.util.folders import CONFIG, STATE, is_run

SAVE = getattr(signal, "SIGUSR1", None)  # which Windows has not
logger = logging.getLogger(__name__)


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
    if (holds_work(folder) and not rank_zero_only.rank) or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--logdir: {folder} exists already; resume it by --resume {folder}, or name another")
    return folder


def resume_state(resume: str) -> tuple[Path | None, int]:
    """The state that a run resumes from and its step; None and 0 for a run that was killed before its first state.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(resume) if resume.endswith(".ckpt") else Path(resume) / STATE
    if not path.exists() and not resume.endswith(".ckpt"):
        return None, 0
    try:
        return path, torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except (OSError, RuntimeError, KeyError, TypeError, EOFError, UnpicklingError) as error:
        raise UserError(f"--resume: {path} is not a resume state, or damaged; name another of the run's") from error


@contextmanager
def working_in(folder: Path, config: str) -> Iterator[None]:
    """Locks a run folder and writes its config; of a run that fails before its first state, nothing is left.

    Raises:
        UserError: another process is at work in it.
    """
    if rank_zero_only.rank:  # the first process has it for all
        yield
        return
    new = not holds_work(folder)
    with locked(folder):
        try:
            if not is_run(folder):
                write(folder / CONFIG, config.encode())
            yield
        except (UserError, OSError):
            if new and not (folder / "models").exists():
                shutil.rmtree(folder)
            raise


class Stopped(Exception):
    """A signal has ended the training; what it reached is saved."""


class StateFile(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        with replacing(Path(path)) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # how PyTorch closes an archive that could not be written
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


class ResumeState(pl.Callback):
    """Writes `models/last.ckpt` every so many optimiser steps and at the end, and obeys signals.

    SIGTERM and Ctrl-C finish the step, save, and raise `Stopped`; a second Ctrl-C ends the process at once. SIGUSR1
    saves and continues, and on SLURM Lightning then requeues the job. It has to be the last of the callbacks: the state
    has what the others did at its step. (Lightning's ModelCheckpoint also saves between the micro-batches of a resumed
    run, and before the callbacks' `on_train_end`.)

    Args:
        every: optimiser steps between two states.
        keep: how many of the last states there are: with 2 or more, also `step=000400.ckpt` and so on.
    """

    def __init__(self, every: int = 500, keep: int = 1) -> None:
        check_range("save_every", every, 1)
        check_range("keep", keep, 1)
        self.every, self.keep = every, keep
        self._stop = self._save = False
        self._requeue: object = None  # what Lightning does about SIGUSR1
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        if SAVE is not None:
            self._requeue = signal.getsignal(SAVE)
        for number in {signal.SIGTERM, signal.SIGINT, SAVE} - {None}:  # Lightning puts the former handlers back
            signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Raises `Stopped` once a state is written, where a signal asked for an end."""
        if trainer.global_step == self._step:  # between the micro-batches of one optimiser step
            return
        self._step = trainer.global_step
        stop = trainer.strategy.reduce_boolean_decision(self._stop, all=False)
        save = trainer.strategy.reduce_boolean_decision(self._save, all=False)
        if self._step == trainer.max_steps or trainer.should_stop:  # the end, whose state is written after all else
            return
        if stop or save or self._step % self.every == 0:
            self._write(trainer)
        if save:
            self._save = False
            if callable(self._requeue):
                self._requeue(SAVE, None)
        if stop:
            raise Stopped

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE:
            self._save = True
            return
        self._stop = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nfinishing the step, then saving; Ctrl-C stops at once\n")  # `print` may be busy

    def _write(self, trainer: pl.Trainer) -> None:
        root = Path(trainer.default_root_dir)
        for log in trainer.loggers:
            log.save()
        trainer.save_checkpoint(root / STATE, weights_only=False)
        if not trainer.is_global_zero:
            return
        if self.keep > 1:
            with replacing(root / f"models/step={trainer.global_step:06d}.ckpt") as partial:
                shutil.copyfile(root / STATE, partial)
        states = sorted((root / "models").glob("step=*.ckpt"), reverse=True)  # the last first
        for old in states[self.keep if self.keep > 1 else 0 :]:
            old.unlink()
        for requeued in root.glob("hpc_ckpt_*.ckpt"):  # Lightning would prefer it
            requeued.unlink()


class NonFinite(UserError):
    """A loss or gradient is NaN or infinite; what is learned is as it was after the last step."""


class Finite(pl.Callback):
    """Looks at every loss, and at the gradients before each optimiser step: what is not finite is never learned from.

    Gradients of several processes have been averaged by then, so that all of them see a fault of one. With a loss
    scaler (16-mixed) gradients that overflow are its business: it leaves the step out and scales less.

    Args:
        fault: "stop" raises `NonFinite`; "skip" leaves out the optimiser step.
    """

    def __init__(self, fault: Literal["stop", "skip"] = "stop") -> None:
        self.fault = fault
        self._found = ""

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not math.isfinite(loss.detach()):
            self._found = f"the loss is {loss.item():g}"

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        learned = [parameter for parameter in pl_module.parameters() if parameter.grad is not None]
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if not scaled and learned and not math.isfinite(nn.utils.get_total_norm([p.grad for p in learned])):
            self._found = self._found or "a gradient is not finite"
        if not self._found:
            return
        found, self._found = f"step {trainer.global_step + 1}: {self._found}", ""
        if self.fault == "stop":
            raise NonFinite(f"{found}; lower model.params.learning_rate, or leave such steps out by non_finite=skip")
        logger.warning("warning: %s; the step is left out", found)
        for parameter in learned:
            parameter.grad = None


class Log(TensorBoardLogger):
    """TensorBoard's log, with the config among its hyperparameters beside the loss."""

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any], *_: object, **__: object) -> None:
        """Lightning would show the config beside a figure of its own that is always -1."""
        self.hparams = dict(params)  # for hparams.yaml
        for summary in hparams(flat(params), {"train/loss": None}):  # the values come from the log
            self.experiment.file_writer.add_summary(summary)


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, bool | float | str]:
    """Nested mappings as one, with keys such as `data.params.seed`; lists as text."""
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
