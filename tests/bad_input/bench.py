"""Runs a command with bad input, in this process, and checks what every command promises about mistakes.

A mistake ends in exit status 2 and one line `error: …` that names the flag, key or file; nothing is written, and it
takes less than 5 seconds.
"""

import io
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from ldm.util.config import ROOT

SECONDS, HANGS, LONGEST = 5.0, 20, 420  # of a mistake; of any command; characters of a mistake's line
POCKET = str(ROOT / "configs/backbone/pocket.yaml")
TOLD = (
    "trainable parameters, ",
    " photo of ",
    " photos of ",
    "; masks: ",
)  # of a model and photos that were read without a mistake
COMMANDS = {  # as users type them -> module
    "main.py": "main",
    "soft_segment": "data.soft_segment",
    "estimate": "scripts.estimate_C_inv",
    "experiment": "scripts.experiment",
    "benchmark": "scripts.benchmark",
    "convert": "scripts.convert_concept",
    "demo": "scripts.demo",
    "inspect": "scripts.inspect_file",
    "metrics": "scripts.metrics",
    "txt2img": "scripts.infusion_txt2img",
}


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit status, what it said, seconds."""

    status: object
    out: str
    err: str
    seconds: float


class Hangs(BaseException):
    """A command does not end; no command catches this."""


class Bench:
    """A working folder in which commands run.

    Attributes:
        folder: the working directory.
        concept: a concept file of the pocket model.
    """

    def __init__(self, folder: Path, concept: Path) -> None:
        self.folder, self.concept = folder, concept

    def run(self, command: str, *arguments: object) -> Outcome:
        """Runs a command; `FOLDER` and `CONCEPT` in its arguments stand for the attributes."""
        main = import_module(COMMANDS[command]).main
        words = [str(word) for word in arguments]
        words = [word.replace("FOLDER", str(self.folder)).replace("CONCEPT", str(self.concept)) for word in words]
        out, err, status = io.StringIO(), io.StringIO(), 0
        with fresh_process([command, *words]), redirect_stdout(out), redirect_stderr(err), watched():
            clocks = time.monotonic, time.process_time  # in the second, other work on the machine does not count
            started = [clock() for clock in clocks]
            try:
                main()
            except SystemExit as stop:
                status = stop.code
            seconds = min(clock() - start for clock, start in zip(clocks, started, strict=True))
        return Outcome(status, out.getvalue(), err.getvalue(), seconds)

    def refuse(self, command: str, *arguments: object, says: str, warns: tuple[str, ...] = ()) -> str:
        """Runs a command that must refuse; returns its line.

        Args:
            says: part of the line.
            warns: parts of the warnings that may come before it, in order.
        """
        before = listing(self.folder)
        found = self.run(command, *arguments)
        *above, line = found.err.rstrip("\n").split("\n")
        above = [text for text in above if text.strip() and not any(part in text for part in TOLD)]
        assert line.startswith("error: ") and found.status == 2, (found.status, found.err)
        assert len(above) == len(warns) and all(map(str.__contains__, above, warns)), found.err
        assert says in line, line
        assert len(line) <= LONGEST, line
        assert line.isprintable(), repr(line)
        assert "Traceback" not in found.err + found.out
        assert listing(self.folder) == before, "something was written"
        assert found.seconds < SECONDS, found.seconds
        return line

    def work(self, command: str, *arguments: object) -> Outcome:
        """Runs a command that must do its work."""
        found = self.run(command, *arguments)
        assert found.status == 0 and "error:" not in found.err, found.err
        return found


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder: path -> size and time of the last change."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            said = path.lstat()
            found[str(path)] = (0, 0) if path.is_dir() else (said.st_size, said.st_mtime_ns)
    return found


@contextmanager
def fresh_process(words: list[str]) -> Iterator[None]:
    """Arguments, log and warnings as a new process has them; put back afterwards."""
    handlers, level, words_before, format = logging.root.handlers, logging.root.level, sys.argv, warnings.formatwarning
    default = torch.get_rng_state()
    logging.root.handlers, sys.argv = [], words
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, kind, file, line, *_: sys.stderr.write(
            warnings.formatwarning(message, kind, file, line)
        )
        try:
            yield
        finally:
            logging.root.handlers, sys.argv, warnings.formatwarning = handlers, words_before, format
            logging.root.setLevel(level)
            torch.set_rng_state(default)


@contextmanager
def watched() -> Iterator[None]:
    """Raises `Hangs` in what takes too long."""

    def stop(*_: object) -> None:
        raise Hangs(f"not done after {HANGS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
