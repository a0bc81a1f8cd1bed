"""Weights are compared with what was published, and what is lacking is named."""

from dataclasses import replace

import pytest

import scripts.weights
from ldm.util.digests import sha256
from scripts.weights import SD15, main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Small files in the places of the weights, which are said to have been published so."""
    for weights in SD15:
        for name in (weights.path.rpartition("/")[2], *weights.beside):
            file = (tmp_path / weights.path).with_name(name)
            file.parent.mkdir(exist_ok=True)
            file.write_text(weights.source)
    published = [
        replace(weights, sha256=sha256(tmp_path / weights.path), size=len(weights.source))
        if weights.sha256
        else weights
        for weights in SD15
    ]
    monkeypatch.setattr(scripts.weights, "SD15", published)
    return tmp_path


def test_what_is_as_published(folder, capsys):
    main(["--ckpt", str(folder)])
    said = capsys.readouterr().out.splitlines()
    assert [line.endswith("as published") for line in said] == [True, True, False, False]
    assert said[2].endswith("compare it with facebook/dino-vits16")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / SD15[0].path).write_text("short"), "has 5 bytes instead of 43: fetch it again"),
        (lambda folder: (folder / SD15[1].path).write_text("x" * 29), "instead of"),
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
    assert all(weights.source in said for weights, said in zip(SD15, capsys.readouterr().err.splitlines(), strict=True))
