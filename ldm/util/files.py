"""Files that are there whole or not at all, and folders that one process at a time works in."""

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path

from ldm.util.errors import UserError

HOST = re.sub(r"\W", "-", socket.gethostname())
PARTIAL = re.compile(r"\.(?P<pid>\d+)@(?P<host>[\w-]*)\.\d+\.partial")
LOCK = ".lock"
NUMBERS = count()  # of this process's temporary files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file or folder under; without an error inside the `with` it then takes the place of `path`.

    By then the contents are on the disk, so that a crash of the machine, too, leaves the old file or the new one. Makes
    the parent folder if need be. Raises OSError, naming `path`, for what the system does not allow.
    """
    with _beside(path) as partial:
        yield partial
        os.replace(_finished(partial), path)
        _sync(path.parent)


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; a file of that name is replaced."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def copy(source: Path, path: Path) -> None:
    """Copy a file whole or not at all; a file of that name is replaced."""
    with replacing(path) as partial:
        shutil.copyfile(source, partial)


def create(path: Path, content: bytes) -> None:
    """Write a new file whole or not at all; raises FileExistsError where there is one of that name."""
    with _beside(path) as partial:
        partial.write_bytes(content)
        try:
            os.link(_finished(partial), path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with path.open("xb") as file:
                file.write(content)
                os.fsync(file.fileno())
        _sync(path.parent)


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keeps other processes out of a folder, which is made if need be.

    The system itself lets go of the lock when its process ends, however it ends: none is ever stale.

    Args:
        wait: until the folder is free.

    Raises:
        UserError: another process has the folder, and this one does not wait.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise UserError(
            f"{folder}: another process is at work in this folder: wait until it ends, or name another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def holds_work(folder: Path) -> bool:
    """Whether there is anything in a folder but what `locked` and an interrupted `replacing` leave."""
    return folder.is_dir() and any(name != LOCK and not PARTIAL.fullmatch(name) for name in os.listdir(folder))


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder beside it, which is removed in the end."""
    folder = path.parent / f".{os.getpid()}@{HOST}.{next(NUMBERS)}.partial"
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, where a folder is to be", str(path.parent))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path.parent.absolute(), os.getpid())
        folder.mkdir()
        yield folder / path.name
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the name that the user knows
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@cache
def _tidy(folder: Path, process: int) -> None:
    """Removes the temporary folders of this machine's processes that were killed, once for each process."""
    for name in os.listdir(folder):
        found = PARTIAL.fullmatch(name)
        if found and found["host"] == HOST and not _alive(int(found["pid"])):
            shutil.rmtree(folder / name, ignore_errors=True)


def _finished(partial: Path) -> Path:
    """The same path, once its files have the permissions of any new file and are on the disk."""
    mode = partial.parent.stat().st_mode & 0o666
    for file in [partial] if partial.is_file() else [path for path in partial.rglob("*") if path.is_file()]:
        os.chmod(file, mode)  # some libraries' writers give fewer
        _sync(file)
    return partial


def _alive(process: int) -> bool:
    if os.name == "nt":  # cannot be asked without harm
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _sync(path: Path) -> None:
    """Has the system put a file, or a folder's list of names, on the disk."""
    if os.name == "nt" and path.is_dir():  # has no such call
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
