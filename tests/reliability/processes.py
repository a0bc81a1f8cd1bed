"""Commands in processes of their own, forked from one that has imported everything, in which things go wrong."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.reduction import DupFd
from typing import Any

PRELOADED = (
    *("torch", "pytorch_lightning", "tensorboard", "main", "scripts.metrics", "data.masks", "clipseg.weights"),
    *("infusion.training.trainer", "infusion.training.callbacks", "infusion.metrics.run.evaluate"),
    "data.latents",
)
DATE = "1700000000"


@dataclass(frozen=True)
class Faults:
    """What goes wrong in a process.

    Attributes:
        killed_at: number of the call, from 0, among those that put files on the disk, at which the process dies.
        file_size: limit of every file, in bytes; a longer write fails as on a full disk.
        signals: (signal, number of optimiser steps after which it comes; -1 is while the photos are encoded).
        environment: variables.
        prepare: is called before the command.
    """

    killed_at: int | None = None
    file_size: int | None = None
    signals: Sequence[tuple[int, int]] = ()
    environment: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] = dict

    def arrange(self) -> None:
        os.environ |= {"SOURCE_DATE_EPOCH": DATE, "OMP_NUM_THREADS": "1"} | self.environment
        if self.killed_at is not None:
            die_at(self.killed_at)
        if self.file_size is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_size, self.file_size))
        if self.signals:
            send(self.signals)
        self.prepare()


def die_at(number: int) -> None:
    """Kills this process at one of its calls of fsync, replace, link and rename."""
    calls = iter(range(number + 1))

    def dying(call: Callable) -> Callable:
        def wrapped(*args: Any, **options: Any) -> Any:
            if next(calls, number) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return wrapped

    for name in ("fsync", "replace", "link"):
        setattr(os, name, dying(getattr(os, name)))


def send(signals: Sequence[tuple[int, int]]) -> None:
    """Sends signals to this process while the optimiser steps are made."""
    from data.latents import ConceptData
    from infusion.training.trainer import ConceptTrainer

    pending = list(signals)

    def before(cls: type, name: str, steps: Callable[[Any], int]) -> None:
        method = getattr(cls, name)

        def wrapped(instance: Any, *args: Any, **options: Any) -> Any:
            while pending and steps(instance) >= pending[0][1]:
                os.kill(os.getpid(), pending.pop(0)[0])
            return method(instance, *args, **options)

        setattr(cls, name, wrapped)

    before(ConceptData, "setup", lambda _: -1)
    before(ConceptTrainer, "training_step", lambda module: module.global_step)


class Output:
    """What a process and those that it starts write, through a pipe: no limit of files' sizes holds for it."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._end, self._start = os.pipe()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __reduce__(self) -> tuple:
        """In the process that is started it is the pipe's descriptor."""
        return descriptor, (DupFd(self._start),)

    def text(self) -> str:
        """What has been written; processes that outlive the first are not waited for."""
        os.close(self._start)
        self._thread.join(1)
        return b"".join(self._pieces).decode()

    def _read(self) -> None:
        while piece := os.read(self._end, 2**16):
            self._pieces.append(piece)
        os.close(self._end)


def descriptor(duplicate: Any) -> int:
    return duplicate.detach()


def run_command(module: str, words: Sequence[str], faults: Faults, pipe: int) -> None:
    """What the process does: `python <module> <words>`."""
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    os.close(pipe)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    faults.arrange()
    import torch

    torch.set_num_threads(1)
    sys.argv = [f"{module}.py", *words]
    sys.modules.get(module, __import__(module, fromlist=["main"])).main()


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, negative for a signal, what it said, and how many seconds it took."""

    status: int
    said: str
    seconds: float
