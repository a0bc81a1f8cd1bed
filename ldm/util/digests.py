"""SHA-256 of files; of a large one it is worked out once, and remembered in the user's cache folder.

`sha256.json` there maps a file's path to its size, time of change and SHA-256, and may be deleted at any time. The
folder is `INFUSION_CACHE`, or else `infusion` in `XDG_CACHE_HOME` or `~/.cache`. Where it cannot be read or written,
files are read each time.
"""

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from ldm.util.files import write

FOLDER = "INFUSION_CACHE"  # variable of the environment
NAME = "sha256.json"
LARGE = 2**24  # bytes: a smaller file is read in hundredths of a second
SETTLED = 2 * 10**9  # nanoseconds: a file that is younger may change again without another time of change
MOST = 1000  # files that are remembered

Entry = tuple[int, int, str]  # size in bytes, time of change in nanoseconds, SHA-256


def sha256(path: str | Path) -> str:
    """A file's SHA-256, in lowercase hexadecimal; raises OSError for one that cannot be read."""
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        store = _store() if before.st_size >= LARGE else None
        name = str(Path(path).resolve())
        if store and (known := _read(store).get(name)) and known[:2] == (before.st_size, before.st_mtime_ns):
            return known[2]
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    same = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    if store and same and time.time_ns() - after.st_mtime_ns >= SETTLED:
        _remember(store, name, (after.st_size, after.st_mtime_ns, digest))
    return digest


def _store() -> Path | None:
    """The file that remembers; None where the user has no cache folder."""
    if own := os.environ.get(FOLDER):
        return Path(own) / NAME
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # as its specification has it, any other counts as none
        return Path(shared) / "infusion" / NAME
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "infusion" / NAME if os.path.isabs(home) else None


def _read(store: Path) -> dict[str, Entry]:
    """What is remembered; nothing where the file is not there or damaged."""
    try:
        found = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {name: tuple(entry) for name, entry in entries if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, list) or [type(value) for value in entry] != [int, int, str]:
        return False
    return re.fullmatch("[0-9a-f]{64}", entry[2]) is not None


def _remember(store: Path, name: str, entry: Entry) -> None:
    """Adds a file, in place of the oldest where there are many."""
    known = {other: old for other, old in _read(store).items() if other != name} | {name: entry}
    content = json.dumps(dict(list(known.items())[-MOST:]), indent=1)
    with suppress(OSError):
        write(store, content.encode())
