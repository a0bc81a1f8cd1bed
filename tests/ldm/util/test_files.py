import errno
import os
import resource
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ldm.util.cli import UserError
from ldm.util.files import create, holds_work, locked, numbered_lines, read_text, replacing, write
from ldm.util.run import StateFile
from ldm.weights.checkpoint import write as write_tensors

SLEEPER = "import sys, time; print('ready', flush=True); time.sleep(60)"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "new/folder/file.txt"
    write(path, b"old")
    with replacing(path) as partial:
        partial.write_bytes(b"ne")
        assert path.read_bytes() == b"old"
        partial.write_bytes(b"new")
    assert path.read_bytes() == b"new" and names(path.parent) == ["file.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    write(tmp_path / "file.txt", b"old")
    with pytest.raises(RuntimeError, match="half-way"), replacing(tmp_path / "file.txt") as partial:
        partial.write_bytes(b"ne")
        raise RuntimeError("half-way")
    assert (tmp_path / "file.txt").read_bytes() == b"old" and names(tmp_path) == ["file.txt"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "folder") as partial:
        (partial / "in").mkdir(parents=True)
        raise RuntimeError
    assert names(tmp_path) == []
    with replacing(tmp_path / "folder") as partial:
        (partial / "in").mkdir(parents=True)
        (partial / "in/file").write_text("here")
    assert (tmp_path / "folder/in/file").read_text() == "here" and names(tmp_path) == ["folder"]


def test_what_is_new_overwrites_nothing(tmp_path):
    create(tmp_path / "a.txt", b"first")
    with pytest.raises(FileExistsError):
        create(tmp_path / "a.txt", b"second")
    assert (tmp_path / "a.txt").read_bytes() == b"first" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_permissions_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        write(tmp_path / "a.txt", b"")
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@contextmanager
def full_disk():
    """Files of at most 1,000 bytes: what a write beyond that gets is what a full disk gives, but for the number."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITERS = {
    "bytes": lambda path: write(path, bytes(5000)),
    "new": lambda path: create(path.with_name("new"), bytes(5000)),
    "tensors": lambda path: write_tensors(path, {"a": torch.zeros(5000)}),
    "state": lambda path: StateFile().save_checkpoint({"a": torch.zeros(5000)}, path),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, writer):
    path = tmp_path / "file"
    write(path, b"old")
    with pytest.raises(OSError, match="File too large") as raised, full_disk():
        writer(path)
    assert Path(raised.value.filename).parent == tmp_path and raised.value.errno == errno.EFBIG
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_folder_that_must_not_be_written_to(shelf, as_nobody, writer):
    with as_nobody(), pytest.raises(PermissionError) as raised:
        writer(shelf / "file")
    assert Path(raised.value.filename).parent == shelf and names(shelf) == []


def test_a_locked_folder_is_left_when_its_process_ends_however_it_ends(tmp_path):
    code = "from pathlib import Path; from ldm.util.files import locked\n"
    code += f"with locked(Path({str(tmp_path)!r})):\n    {SLEEPER}"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    assert other.stdout.readline() == b"ready\n"
    with pytest.raises(UserError, match="another process is at work in this folder"), locked(tmp_path):
        pass
    other.kill()
    other.wait()
    with locked(tmp_path):
        pass
    with locked(tmp_path):  # again, and it was let go
        pass


def test_a_folder_with_a_lock_alone_holds_no_work(tmp_path):
    assert not holds_work(tmp_path / "nowhere")
    with locked(tmp_path / "new"):
        assert not holds_work(tmp_path / "new")
        (tmp_path / "new/.1.partial").mkdir()
        assert not holds_work(tmp_path / "new")
        (tmp_path / "new/file").touch()
        assert holds_work(tmp_path / "new")


def test_lines_are_numbered_as_an_editor_does_and_parted_at_line_feeds_only():
    assert numbered_lines("\n a\u2028b \n\t\nc\x0bd") == [(2, "a\u2028b"), (4, "c\x0bd")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_is_read_as_windows_saves_it(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("Bär\r\n{}\r\n".encode(encoding))
    assert read_text(tmp_path / "a.txt") == "Bär\n{}\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "a.txt: cannot be read as text: No such file"),
        ("Bär".encode("latin-1"), "a.txt: cannot be read as text: save it as UTF-8"),
        ("bear".encode("utf-16-le"), "a.txt: cannot be read as text: save it as UTF-8"),
        ("Bär".encode("utf-16")[:-1], "a.txt: cannot be read as text: save it as UTF-8"),
        (b"x" * 11, "a.txt: is larger than 10 bytes"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(tmp_path, content, says):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_text(tmp_path / "a.txt", most=10)
