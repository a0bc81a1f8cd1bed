import pytest
import torch
from safetensors import safe_open

from infusion.metrics.run.cache import Cache
from ldm.util.cli import UserError


def squares(calls, fail_at=None):
    def make(rows):
        if fail_at is not None and fail_at in rows:
            raise KeyboardInterrupt
        calls.append(list(rows))
        return {"square": torch.tensor([float(i * i) for i in rows])[:, None], "row": torch.tensor(list(rows))}

    return make


def test_rows_are_made_in_batches_and_found_again(tmp_path):
    calls = []
    rows = Cache(tmp_path).rows("stage", {"seed": 1}, 5, 2, squares(calls))
    assert calls == [[0, 1], [2, 3], [4]] and len(rows) == 5
    assert rows["square"].tolist() == [[0], [1], [4], [9], [16]] and rows["row"].tolist() == [0, 1, 2, 3, 4]
    again = Cache(tmp_path).rows("stage", {"seed": 1}, 5, 2, squares(calls))
    assert len(calls) == 3 and again.key == rows.key and torch.equal(again["square"], rows["square"])
    fewer = Cache(tmp_path).rows("stage", {"seed": 1}, 2, 2, squares(calls))
    assert len(calls) == 3 and fewer["row"].tolist() == [0, 1]
    more = Cache(tmp_path).rows("stage", {"seed": 1}, 7, 4, squares(calls))
    assert calls[3:] == [[5, 6]] and more["row"].tolist() == list(range(7))


def test_a_killed_run_loses_one_batch(tmp_path):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).rows("stage", {}, 6, 2, squares(calls, fail_at=5))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    rows = Cache(tmp_path).rows("stage", {}, 6, 2, squares(calls))
    assert calls == [[0, 1], [2, 3], [4, 5]] and rows["row"].tolist() == list(range(6))


def test_what_determines_rows_names_their_file(tmp_path):
    cache, calls = Cache(tmp_path), []
    keys = {
        cache.rows(stage, what, 1, 1, squares(calls)).key
        for stage, what in (("a", {"x": 1}), ("a", {"x": 2}), ("b", {"x": 1}), ("a", {"y": 1}), ("a", {}))
    }
    assert len(keys) == len(calls) == 5 == len(list(tmp_path.iterdir()))
    assert cache.rows("a", {"y": [1, 2], "x": 1}, 1, 1, squares([])).key == (
        cache.rows("a", {"x": 1, "y": [1, 2]}, 1, 1, squares([])).key
    )
    with safe_open(next(tmp_path.glob("b-*")), "pt") as file:
        assert file.metadata() == {"format": "pt", "what": '{"x": 1}'}


def test_figures_are_kept_too(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"leakage": {"value": 0.1 + 0.2, "stderr": None, "n": 3}}

    first, second = (Cache(tmp_path).figures("exact", {"seed": 1}, make) for _ in range(2))
    assert first == second == make() and len(calls) == 2
    assert Cache(tmp_path).figures("exact", {}, make) == first and len(calls) == 3
    file = next(tmp_path.glob("exact-*.json"))
    file.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        [Cache(tmp_path).figures("exact", what, make) for what in ({}, {"seed": 1})]


def test_files_that_cannot_be_used(tmp_path):
    cache = Cache(tmp_path)
    key = cache.rows("stage", {}, 1, 1, squares([])).key
    (tmp_path / f"{key}.safetensors").write_bytes(b"half of it")
    with pytest.raises(UserError, match="is damaged .*; delete it"):
        cache.rows("stage", {}, 1, 1, squares([]))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="Not a directory"):
        Cache(tmp_path / "file").rows("stage", {}, 1, 1, squares([]))
