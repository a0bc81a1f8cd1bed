"""Signals while training: noted at once, obeyed between two optimiser steps.

SIGTERM and SIGINT (Ctrl-C) ask for an end, SIGUSR1 for a resume state. A second Ctrl-C ends the process at once.
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

SAID = b"\nfinishing the step, then saving; Ctrl-C stops at once\n"
SAVE = getattr(signal, "SIGUSR1", None)  # which Windows has not


class Stopped(Exception):
    """A signal has ended the training; what it reached is saved."""


class Signals:
    """Listens inside a `with`, and puts back the handlers that were there before.

    Attributes:
        stop: an end is asked for. save: a resume state is asked for.
        training: whether there are steps to finish; until then a signal that asks for an end raises `Stopped`.
        requeue: what Lightning does about SIGUSR1 on a cluster that is to start the job anew (SLURM): save and requeue.
    """

    def __init__(self) -> None:
        self.stop = self.save = self.training = False
        self.requeue: Callable[[int, FrameType | None], None] | None = None
        self._handlers = {signal.SIGTERM: self._end, signal.SIGINT: self._end} | ({SAVE: self._note} if SAVE else {})
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        self._before = {number: signal.getsignal(number) for number in self._handlers}
        for number, handler in self._handlers.items():
            if number != SAVE or "SLURM_JOB_ID" not in os.environ:  # where Lightning has its own only if there is none
                signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self) -> None:
        """Training begins: takes the place of the handlers that Lightning has put in."""
        self.training = True
        for number, handler in self._handlers.items():
            other = signal.signal(number, handler)
            if number == SAVE and callable(other) and other != handler:
                self.requeue = other

    def _end(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.stop = True
        if not self.training:
            raise Stopped
        os.write(sys.stderr.fileno(), SAID)  # `print` may be busy

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.save = True
