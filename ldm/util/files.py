"""Files that are there whole or not at all, and folders that one process at a time works in."""

import codecs
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from ldm.util.cli import UserError

LOCK, PARTIAL = ".lock", ".partial"
MARKS = {  # how a text begins that has a byte order mark -> its encoding; UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file or folder under; without an error inside the `with` it then takes the place of `path`.

    A file is on the disk by then, so that a crash of the machine, too, leaves the old one or the new one. Makes the
    parent folder if need be. Raises OSError, naming `path`, for what the system does not allow.
    """
    folder = path.parent / f".{uuid4().hex}{PARTIAL}"
    try:
        folder.mkdir(parents=True)
        partial = folder / path.name
        yield partial
        if partial.is_file():
            partial.chmod(folder.stat().st_mode & 0o666)  # some libraries' writers give fewer permissions
            with partial.open("r+b") as file:  # Windows flushes no file that is open for reading alone
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the name that the user knows
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def encoding_of(path: str | Path) -> str:
    """Of a text that a user wrote: UTF-8, or UTF-16 or UTF-32 with a byte order mark, as Windows saves it.

    Raises:
        UserError: the file cannot be read; the message names it.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except (OSError, ValueError) as error:  # ValueError: no name at all
        raise UserError(f"{path}: cannot be read as text: {getattr(error, 'strerror', None) or error}") from error
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")


def read_text(path: str | Path, most: int | None = None) -> str:
    """A text that a user wrote, see `encoding_of`; UserError, which names the file, also above `most` bytes."""
    encoding = encoding_of(path)
    if most is not None and os.path.getsize(path) > most:
        raise UserError(f"{path}: is larger than {most:,} bytes: make it smaller")
    try:
        with open(path, encoding=encoding) as file:
            text = file.read()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # also of UTF-16 without a mark
        raise UserError(f"{path}: cannot be read as text: save it as UTF-8")
    return text


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """The lines of a text that are not blank, stripped, each with its number from 1.

    Line feeds alone part them: pasted text has other separators, at which str.splitlines would cut.
    """
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; a file of that name is replaced."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def copy(source: Path, path: Path) -> None:
    """Copy a file whole or not at all; a file of that name is replaced."""
    with replacing(path) as partial:
        shutil.copyfile(source, partial)


def create(path: Path, content: bytes) -> None:
    """Write a new file; raises FileExistsError where there is one of that name, whichever process made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("xb")
    try:
        with file:
            file.write(content)
    except OSError as error:
        path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def clear(folder: Path) -> None:
    """Removes what processes that were killed have left half written, in a folder where no other is at work."""
    for left in list(folder.rglob(f"*{PARTIAL}")):
        shutil.rmtree(left)


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keeps other processes out of a folder, which is made if need be, and clears what killed ones left in it.

    The system itself lets go of the lock when its process ends, however it ends: none is ever stale.

    Args:
        wait: until the folder is free.

    Raises:
        UserError: another process has the folder, and this one does not wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=-1 if wait else 0):
            clear(folder)
            yield
    except Timeout as error:
        raise UserError(
            f"{folder}: another process is at work in this folder: wait until it ends, or name another folder"
        ) from error


def holds_work(folder: Path) -> bool:
    """Whether there is anything in a folder but what `locked` and an interrupted `replacing` leave."""
    return folder.is_dir() and any(name != LOCK and not name.endswith(PARTIAL) for name in os.listdir(folder))
