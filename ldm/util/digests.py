"""SHA-256 of files; of a large one it is worked out once, and remembered in the user's cache folder.

`sha256.json` there maps a file's path to its size, time of change and SHA-256, and may be deleted at any time. The
folder is `INFUSION_CACHE`, or else `infusion` in `XDG_CACHE_HOME` or `~/.cache`.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from ldm.util.files import write

FOLDER = "INFUSION_CACHE"  # variable of the environment
LARGE = 2**24  # bytes: a smaller file is read in hundredths of a second
SETTLED = 2 * 10**9  # nanoseconds: a file that is younger may change again without another time of change


def sha256(path: str | Path) -> str:
    """A file's SHA-256, in lowercase hexadecimal; raises OSError for one that cannot be read."""
    with open(path, "rb") as file:
        before, name = _state(file.fileno()), str(Path(path).resolve())
        known = _read() if before[0] >= LARGE else {}
        size, changed, digest = known.get(name, (None, None, None))
        if [size, changed] == before:
            return digest
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        settled = before == _state(file.fileno()) and time.time_ns() - before[1] >= SETTLED
    if before[0] >= LARGE and settled:
        with suppress(OSError):  # without a folder to write to, it is worked out each time
            write(_store(), json.dumps(known | {name: [*before, digest]}, indent=1).encode())
    return digest


def _state(descriptor: int) -> list[int]:
    """Size in bytes and time of change in nanoseconds."""
    said = os.fstat(descriptor)
    return [said.st_size, said.st_mtime_ns]


def _store() -> Path:
    """The file that remembers."""
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(FOLDER) or Path(shared) / "infusion") / "sha256.json"


def _read() -> dict[str, list]:
    """What is remembered; nothing where the file is not there or damaged."""
    try:
        return {
            name: [size, changed, digest] for name, (size, changed, digest) in json.loads(_store().read_text()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
