import hashlib
import json
import os
from pathlib import Path

import pytest

from ldm.util import digests
from ldm.weights import checkpoint


@pytest.fixture
def store(monkeypatch, tmp_path) -> Path:
    """The file that remembers, in a folder of this test; every file counts as large."""
    monkeypatch.setenv(digests.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LARGE", 1)
    return tmp_path / "cache" / "sha256.json"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """What files are read for their SHA-256."""
    found, digest = [], hashlib.file_digest

    def counting(file, name):
        found.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    return found


def old_file(path: Path, content: bytes = b"weights", seconds: int = 100) -> Path:
    path.write_bytes(content)
    os.utime(path, (0, seconds))
    return path


def test_a_large_file_is_read_once(store, reads, tmp_path, monkeypatch):
    path = old_file(tmp_path / "a")
    expected = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.chdir(tmp_path)
    assert [checkpoint.sha256(path), checkpoint.sha256("a"), digests.sha256(path)] == [expected] * 3
    assert reads == ["a"]
    assert json.loads(store.read_text()) == {str(path): [7, 100 * 10**9, expected]}
    assert [file.name for file in store.parent.iterdir()] == [store.name]


def test_a_file_that_changed_is_read_again(store, reads, tmp_path):
    path = old_file(tmp_path / "a")
    digests.sha256(path)
    assert digests.sha256(old_file(path, b"weightz", 101)) == hashlib.sha256(b"weightz").hexdigest()
    assert digests.sha256(old_file(path, b"weight", 101)) == hashlib.sha256(b"weight").hexdigest()
    assert digests.sha256(old_file(tmp_path / "b", b"weight", 101)) == hashlib.sha256(b"weight").hexdigest()
    assert reads == ["a", "a", "a", "b"]


def test_small_files_and_those_just_written_are_not_remembered(store, tmp_path, monkeypatch):
    (tmp_path / "new").write_bytes(b"weights")
    digests.sha256(tmp_path / "new")
    monkeypatch.setattr(digests, "LARGE", 8)
    digests.sha256(old_file(tmp_path / "small"))
    assert not store.exists()


BROKEN = [b"", b"{", b"[]", b"\xff", b'{"PATH": 1}', b'{"PATH": [7, 100000000000]}']


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_what_is_damaged_is_made_anew(store, tmp_path, content):
    path = old_file(tmp_path / "a")
    store.parent.mkdir()
    store.write_bytes(content.replace(b"PATH", bytes(path)))
    expected = hashlib.sha256(b"weights").hexdigest()
    assert digests.sha256(path) == expected
    assert json.loads(store.read_text()) == {str(path): [7, 100 * 10**9, expected]}


def test_a_folder_that_cannot_be_written_is_done_without(store, tmp_path, shelf, as_nobody, monkeypatch):
    expected = hashlib.sha256(b"weights").hexdigest()
    path = old_file(shelf / "a") if os.access(shelf, os.W_OK) else old_file(tmp_path / "a")
    monkeypatch.setenv(digests.FOLDER, str(shelf / "cache"))
    with as_nobody():
        assert digests.sha256(path) == expected
    assert not (shelf / "cache").exists()
    monkeypatch.setenv(digests.FOLDER, str(old_file(tmp_path / "file")))
    assert digests.sha256(path) == expected


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv(digests.FOLDER)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert digests._store() == tmp_path / "home/.cache/infusion/sha256.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert digests._store() == tmp_path / "xdg/infusion/sha256.json"
    monkeypatch.setenv(digests.FOLDER, str(tmp_path / "own"))
    assert digests._store() == tmp_path / "own/sha256.json"
    assert not list(tmp_path.iterdir())
