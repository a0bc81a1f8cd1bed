"""What commands share: flags, and errors that a user can fix as one line on stderr with exit code 2."""

import argparse
import errno
import functools
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ldm.util.console import lasting_output
from ldm.util.defaults import PREFIXES

if TYPE_CHECKING:
    import torch

MOST = 1_000_000  # of anything that is counted
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk
LONGEST = 400  # characters of a mistake's line
PATHS = ("FILE", "DIR", "PATH", "RUN", "PNG", "CONFIG", "IN", "OUT")  # metavars of flags that name one file or folder
OUT_OF_MEMORY = (
    "out of memory: in training lower data.params.batch_size (trainer.accumulate_grad_batches makes up for it) or add "
    "--base configs/with/small_card.yaml; in sampling lower --n_samples, --H and --W or use --precision autocast; in "
    "measuring lower --batch_size"
)
ALONE = "another process of this run has ended, and this one cannot continue without it: see its error, then resume"


class UserError(ValueError):
    """A mistake that the user can put right; the message names the flag, key or file and says what to do.

    Code that checks what comes from outside raises it: flags, configs, files, photos, arguments of public functions.
    """


def report(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command: what a user or the machine can put right becomes one line `error: …` and exit code 2.

    That is `UserError`, an OSError that names a file, a full disk, a want of memory, where the line says what lowers
    it, and the end of one of several processes. Ctrl-C ends the command with exit code 130. Any other exception is a
    bug of ours: it keeps its traceback, and Python exits with 1. What is printed never fails (`ldm.util.console`).
    """

    @functools.wraps(main)
    @lasting_output()
    def wrapped(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            _end(str(error))
        except OSError as error:
            if not error.filename and error.errno not in FULL:
                raise
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
    if error.errno in FULL:
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


def suggestion(name: str, known: list[str]) -> str:
    """`; did you mean X?`, or what there is to choose from, for a name that is not known."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def check_range(name: str, value: float, low: float = -math.inf, high: float = math.inf, inside: bool = False) -> None:
    """Raises UserError, which begins with the name, for a number that is not finite or not from `low` to `high`; with
    `inside`, these two are out of range themselves."""
    if abs(value) < math.inf and (low < value < high if inside else low <= value <= high):
        return
    words = ("above", "below") if inside else ("at least", "at most")
    limits = [f"{word} {limit:,}" for word, limit in zip(words, (low, high), strict=True) if abs(limit) < math.inf]
    if len(limits) == 2 and not inside:
        limits = [f"from {low:,} to {high:,}"]
    raise UserError(f"{name}: must be {' and '.join(limits) or 'a finite number'}, not {value}")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Puts a flag, key or file in front of the message of a UserError from inside the `with`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False or action.default == ""
        return action.help if absent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose help shows the defaults and whose complaints are `UserError`s.

    In what a flag with one of the `PATHS` as its metavar names, ~ is the home folder, also where no shell says so.
    """

    def __init__(self, **options):
        super().__init__(formatter_class=Defaults, allow_abbrev=False, **options)

    def _get_value(self, action: argparse.Action, text: str) -> object:
        return super()._get_value(action, os.path.expanduser(text) if action.metavar in PATHS else text)

    def error(self, message: str) -> NoReturn:
        shown = message if len(message) <= LONGEST else f"{message[:LONGEST]} …"  # it quotes what was typed
        raise UserError(f"{shown} (--help lists the flags)")


class More(argparse.Action):
    """A flag whose values are lists, or mappings; given several times, it holds all of them."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if self.nargs == "+":
            values = [one for many in values for one in many]
        if (earlier := getattr(namespace, self.dest)) is not self.default:
            values = earlier | values if isinstance(values, dict) else [*earlier, *values]
        setattr(namespace, self.dest, values)


def add_base_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what weights a base model has: --ckpt, --part, --use_ema and --no-use_ema."""
    add = parser.add_argument
    add("--ckpt", metavar="FILE", help="weights of the base model; None: the backbone's usual file")
    add(
        "--part",
        metavar="P=FILE",
        type=components,
        action=More,
        help="file of a component alone, such as vae=FILE (unet, vae, text; commas between several)",
    )
    add(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        help="take the averaged weights of the UNet in --ckpt; None: as the concepts were trained",
    )


# types of flags, for argparse


def number(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"`{text}` is not a finite number")
    return value


def numbers(text: str) -> list[float]:
    """One or more finite numbers with commas between them."""
    try:
        return [number(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number, nor several with commas between them") from error


def words(text: str) -> list[str]:
    """One or more words, or groups of words, with commas between them."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"`{text}` is not a word, nor several with commas between them")
    return found


def components(text: str) -> dict[str, str]:
    """Component of a base model -> file that it comes from: one or more `unet=FILE` with commas between them."""
    found = {}
    for part in text.split(","):
        name, sign, file = part.strip().partition("=")
        if not sign or not file:
            raise argparse.ArgumentTypeError(f"`{part}` is not such as unet=FILE")
        if name not in PREFIXES:
            raise argparse.ArgumentTypeError(f"there is no component `{name}`{suggestion(name, list(PREFIXES))}")
        found[name] = file
    return found


def count(text: str, most: int = MOST, least: int = 1) -> int:
    """A whole number from `least` to `most`."""
    if not (text.isascii() and text.isdigit() and len(text) < 100 and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"`{text[:30]}` is not a whole number from {least} to {most:,}")
    return int(text)


batch = functools.partial(count, most=1000)  # of something that takes much memory to work on at a time
processes = functools.partial(count, most=max(8, os.cpu_count() or 1))  # of this machine
seed = functools.partial(count, most=2**63 - 1, least=0)  # as `torch.Generator.manual_seed` takes them


def any_seed(text: str) -> int:
    """As `seed`, or -1 for one that is yet to be drawn."""
    return -1 if text.strip() == "-1" else seed(text)


def writable(text: str) -> str:
    """A folder that files can be written to; it is made when they are."""
    path = Path(text).absolute()
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not os.path.isdir(there):
        raise argparse.ArgumentTypeError(f"{there}: is a file; name a folder to write to")
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise argparse.ArgumentTypeError(f"{there}: cannot be written to; name another folder")
    return text


def written(text: str) -> str:
    """A file in a folder that files can be written to."""
    writable(str(Path(text).parent))
    return text


def find_device(name: str) -> "torch.device":
    """What `--device` names; "auto" is CUDA where there is some.

    Raises:
        UserError: the device cannot be used here.
    """
    import torch  # not above: commands answer --help and mistakes in flags without it

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise UserError(f"--device: {name} cannot be used here; there is {', '.join(there)}") from error
