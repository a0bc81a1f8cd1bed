"""Weights are compared with what was published, and what is lacking is named."""

import pytest

import scripts.weights
from ldm.util.digests import sha256
from scripts.weights import WEIGHTS, main

SOURCES = [source for source, _ in WEIGHTS.values()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Small files in the places of the weights, which are said to have been published so."""
    there = {}
    for names, (source, published) in WEIGHTS.items():
        file = tmp_path / names[-1]
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)
        file.with_name("config.json").write_text("{}")
        there[names] = (source, sha256(file) if published else "")
    (tmp_path / "config.json").unlink()
    monkeypatch.setattr(scripts.weights, "WEIGHTS", there)
    return tmp_path


def test_what_is_as_published(folder, capsys):
    main(["--ckpt", str(folder)])
    said = capsys.readouterr().out.splitlines()
    assert [line.endswith("as published") for line in said] == [True, True, False, False]
    assert said[2].endswith("compare it with facebook/dino-vits16")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "v1-5-pruned-emaonly.safetensors").write_text("short"), "instead of"),
        (lambda folder: (folder / "dino-vits16/config.json").unlink(), "huggingface.co/facebook/dino-vits16"),
    ],
)
def test_what_is_wrong_is_one_line(folder, spoil, message, capsys):
    spoil(folder)
    with pytest.raises(SystemExit, match="2"):
        main(["--ckpt", str(folder)])
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_everything_that_is_lacking_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--ckpt", str(tmp_path)])
    assert all(source in said for source, said in zip(SOURCES, capsys.readouterr().err.splitlines(), strict=True))
