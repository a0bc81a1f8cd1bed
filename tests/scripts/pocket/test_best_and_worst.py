import shutil

import pytest
import torch

from data.pocket.concepts import FOLDER
from scripts.pocket import best_and_worst


def test_the_concept_itself_is_best(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "demo/blue_striped_dog/infusion"
    folder.mkdir(parents=True)
    dogs, fish = (sorted((FOLDER / name).glob("*.png")) for name in ("blue_striped_dog", "other_fish"))
    for i, file in enumerate([*fish[:3], *dogs[:3], *fish[3:]]):
        shutil.copy(file, folder / f"{i:05d}.png")
    tables = []
    monkeypatch.setattr(
        best_and_worst, "captioned_grid", lambda table, *_, **__: tables.append(table) or torch.ones(3, 4, 4)
    )
    monkeypatch.setattr(best_and_worst, "SHOWN", 3)
    words = [str(tmp_path / "demo"), str(tmp_path / "out.png")]
    best_and_worst.main(words)
    (table,) = tables
    photos = table["blue striped dog"]
    same = (table["blue striped dog: best"][:, None] == photos).all(-1).all(-1).all(-1)  # (best, photos)
    assert same.any(1).all() and same.any(0).all()
    assert not (table["blue striped dog: worst"][:, None] == photos).all(-1).all(-1).all(-1).any()
    for refused, message in (
        (words, "exists already"),
        ([str(tmp_path), str(tmp_path / "b.png")], "no samples of a demo"),
    ):
        with pytest.raises(SystemExit) as stop:
            best_and_worst.main(refused)
        assert stop.value.code == 2 and message in capsys.readouterr().err
