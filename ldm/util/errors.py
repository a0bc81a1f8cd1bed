"""Errors that a user can fix: one line on stderr and exit code 2."""

import argparse
import errno
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NoReturn

OUT_OF_MEMORY = (
    "out of memory: in training lower data.params.batch_size (trainer.accumulate_grad_batches makes up for it) or add "
    "--base configs/with/small_card.yaml; in drawing lower --n_samples, --H and --W or use --precision autocast; in "
    "measuring lower --batch_size"
)
ALONE = "another process of this run has ended, and without it this one cannot go on: see what it said, then resume"
LONGEST = 400  # characters of a mistake's line


class UserError(Exception):
    """Something that the user can put right; the message names the flag, key or file and says what to do."""


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False or action.default == ""
        return action.help if absent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose help shows the defaults and whose complaints are `UserError`s."""

    def __init__(self, **options):
        super().__init__(formatter_class=Defaults, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def suggestion(name: str, known: list[str]) -> str:
    """`; did you mean X?`, or what there is to choose from, for a name that is not known."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Puts a flag, key or file in front of the message of a ValueError from inside the `with`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def report(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command: what a user or the machine can put right becomes one line `error: …` and exit code 2.

    That is `UserError`, `ValueError`, what the system refuses (OSError), a want of memory, where the line says what
    lowers it, and the end of one of several processes. Ctrl-C ends the command with exit code 130.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except (UserError, ValueError) as error:
            _end(str(error))
        except OSError as error:
            _end(f"{error.filename}: {_advice(error)}" if error.filename else _advice(error))
        except (MemoryError, RuntimeError) as error:
            if _out_of_memory(error):
                _end(OUT_OF_MEMORY)
            if _alone(error):
                _end(ALONE)
            raise
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    return wrapped


def _end(message: str) -> NoReturn:
    line = "".join(letter if letter.isprintable() else "�" for letter in " ".join(message.split()))
    if len(line) > LONGEST:  # what a file says may be of any length; what to do comes last
        line = f"{line[:280]} … {line[-110:]}"
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def _advice(error: OSError) -> str:
    said = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{said}: make room; what was there before is unchanged"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{said}: allow it, or name another place"
    return said


def _out_of_memory(error: BaseException) -> bool:
    """Whether Python, PyTorch's CPU or a GPU ran out of memory: PyTorch has no class of its own for its CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _alone(error: RuntimeError) -> bool:
    """Whether another process of the same run has ended: NCCL's errors have a class, Gloo's a text."""
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or "remote worker" in str(error)
