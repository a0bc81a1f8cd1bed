"""A reader at work: what it may raise, and what it may never do."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ldm.util.cli import UserError

SECONDS, MEMORY = 10, 2**30  # that one file may take
MESSAGE = 4000  # characters of a message, of which commands show 400
IMPORTED = """
ldm infusion clipseg data torch torchvision pytorch_lightning lightning_fabric lightning_utilities torchmetrics
transformers diffusers huggingface_hub safetensors tokenizers numpy scipy PIL omegaconf yaml antlr4 ftfy wcwidth einops
kornia open_clip matplotlib
"""
PACKAGES = {*IMPORTED.split(), *sys.stdlib_module_names}  # that readers import when they are first used
EVENTS = """
os.system os.exec os.posix_spawn os.fork os.forkpty os.spawn subprocess.Popen os.startfile os.remove os.rename os.rmdir
os.mkdir os.link os.symlink os.truncate os.chmod os.chown os.putenv os.unsetenv os.chdir shutil.copyfile shutil.move
shutil.rmtree socket.connect socket.bind socket.getaddrinfo urllib.Request pickle.find_class ctypes.dlopen
webbrowser.open tempfile.mkstemp tempfile.mkdtemp
"""
DOING = set(EVENTS.split())  # audit events of what no reader does
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_watching: list[list[str]] = []  # what has been seen, while a reader is at work


class Hang(BaseException):
    """No reader catches it."""


def _audit(event: str, arguments: tuple) -> None:
    if not _watching:
        return
    if event in DOING:
        _watching[-1].append(f"{event}{arguments[:2]!r}"[:200])
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        _watching[-1].append(f"open for writing: {arguments[0]!r}")
    elif event == "import" and str(arguments[0]).split(".")[0] not in PACKAGES:
        _watching[-1].append(f"import {arguments[0]}")


sys.addaudithook(_audit)
sys.dont_write_bytecode = True  # of what readers import


@contextmanager
def _bounded() -> Iterator[None]:
    """Within `SECONDS`, and `MEMORY` more than now."""

    def stop(*_: object) -> None:
        raise Hang

    before, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def read(reader: Callable[..., Any], *arguments: Any) -> Any:
    """What the reader gives; None where it refuses by a short ValueError, UserError or OSError of one line.

    Anything else fails: another exception, a longer message, `SECONDS`, `MEMORY`, and whatever is done but reading.
    """
    seen: list[str] = []
    try:
        with _bounded():
            _watching.append(seen)
            try:
                result = reader(*arguments)
            finally:
                _watching.pop()
    except (UserError, OSError) as error:
        said, result = " ".join(str(error).split()), None
        names = sum(len(str(argument)) for argument in arguments if isinstance(argument, str | os.PathLike))
        assert len(said) <= MESSAGE + 2 * min(names, 300), said
    except Hang as error:
        raise AssertionError(f"not done after {SECONDS} seconds") from error
    assert not seen, seen
    return result
