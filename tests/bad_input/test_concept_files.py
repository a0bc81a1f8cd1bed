"""Concept files that are none, through every command that reads them."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.util.config import ROOT

READERS: dict[str, list[str]] = {  # command -> its flags; FILE is the concept file
    "txt2img": ["--personalized_ckpt", "FILE", "--outdir", "FOLDER/out", "--device", "cpu", "--steps", "1"],
    "inspect": ["FILE"],
    "convert": ["FILE", "FOLDER/out.safetensors"],
    "metrics": [
        *("--personalized_ckpt", "FILE", "--images", str(ROOT / "data/pocket/concepts/blue_striped_dog")),
        *("--metrics", "clip_i", "--samples", "2", "--steps", "1", "--out", "FOLDER/out", "--device", "cpu"),
    ],
}
COMMANDS = ("txt2img", "convert", "metrics")  # those that use what inspect_file only describes


class Program:
    """Makes a file when it is unpickled by pickle."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch ran",)


def cut(share: float) -> Callable[[Path, Path], object]:
    def make(path: Path, good: Path) -> None:
        content = good.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return make


def header(length: int, text: bytes = b"{}") -> Callable[[Path, Path], object]:
    return lambda path, _: path.write_bytes(struct.pack("<Q", length) + text)


def sparse(path: Path, _: Path) -> None:
    """A header of 100 MB: the file says so, and is as long."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_000) + b"{")
        file.truncate(100_000_008)


def changed(tensors: Callable | None = None, **said: str | None) -> Callable[[Path, Path], object]:
    """The good file with other tensors, or other metadata; None drops a key."""

    def make(path: Path, good: Path) -> None:
        with safe_open(good, "pt") as file:
            metadata = file.metadata() | said
        held = load_file(good)
        save_file(tensors(held) if tensors else held, path, {k: v for k, v in metadata.items() if v is not None})

    return make


def filled(value: float) -> Callable:
    return lambda held: {name: torch.full_like(tensor, value) for name, tensor in held.items()}


def reshaped(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(7) for name in held}


def huge(path: Path, _: Path) -> None:
    """A tensor of 2**62 numbers, of which there are none."""
    said = json.dumps({"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64]}}).encode()
    path.write_bytes(struct.pack("<Q", len(said)) + said)


FILES: dict[str, Callable[[Path, Path], object]] = {
    "empty": lambda path, _: path.touch(),
    "one byte": cut(0.0005),
    "a tenth": cut(0.1),
    "a half": cut(0.5),
    "nearly whole": cut(0.999),
    "header of 2**60": header(2**60),
    "header of 2**63": header(2**63, b"{" * 100),
    "header of 100 MB": sparse,
    "header beyond the end": header(1000),
    "header of no JSON": header(10, b"{nonsense}"),
    "header of a list": header(2, b"[]"),
    "deep header": header(20_000, b'{"a":' + b"[" * 19_995),
    "huge tensor": huge,
    "text": lambda path, _: path.write_text("a concept"),
    "html": lambda path, _: path.write_text("<!doctype html><title>Sign in</title>"),
    "git-lfs": lambda path, _: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "picture": lambda path, _: Image.new("RGB", (8, 8)).save(path, "PNG"),
    "folder": lambda path, _: path.mkdir(),
    "nothing": lambda path, _: None,
    "broken link": lambda path, _: path.symlink_to(path.with_name("gone")),
    "link to itself": lambda path, _: path.symlink_to(path),
    "pipe": lambda path, _: os.mkfifo(path),
    "pickle": lambda path, _: path.write_bytes(pickle.dumps({"a": 1})),
    "pickle of a program": lambda path, _: path.write_bytes(pickle.dumps(Program())),
    "torch file of a program": lambda path, _: torch.save({"state_dict": Program()}, path),
}


def arguments(words: list[str], name: str) -> list[str]:
    return [word.replace("FILE", name) for word in words]


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("command", READERS)
def test_a_file_that_is_no_concept_is_named(bench, command, case):
    path = bench.folder / "cat.safetensors"
    FILES[case](path, bench.concept)
    bench.refuse(command, *arguments(READERS[command], path.name), says="cat.safetensors")
    assert not (bench.folder / "ran").exists()


CONTENTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no tensors": (changed(lambda held: {}), "cat.safetensors"),
    "nan": (changed(filled(float("nan"))), "cat.safetensors"),
    "inf": (changed(filled(float("inf"))), "cat.safetensors"),
    "integers": (changed(lambda held: {name: tensor.int() for name, tensor in held.items()}), "cat.safetensors"),
    "complex": (changed(lambda held: {name: tensor.cfloat() for name, tensor in held.items()}), "cat.safetensors"),
    "no metadata": (lambda path, good: save_file(load_file(good), path), "cat.safetensors"),
    "newer version": (changed(format_version="999"), "cat.safetensors"),
    "version of a word": (changed(format_version="new"), "cat.safetensors"),
    "another format": (changed(format="lora"), "cat.safetensors"),
    "no superclass": (changed(superclass=None), "cat.safetensors"),
    "empty superclass": (changed(superclass=""), "cat.safetensors"),
    "no templates": (changed(templates=None), "cat.safetensors"),
    "templates of no JSON": (changed(templates="[a"), "cat.safetensors"),
    "templates of a number": (changed(templates="3"), "cat.safetensors"),
    "gate of another kind": (changed(gate="soft"), "cat.safetensors"),
    "tau of nothing": (changed(tau="0"), "cat.safetensors"),
    "tau of a word": (changed(tau="x"), "cat.safetensors"),
    "beta of nan": (changed(beta="nan"), "cat.safetensors"),
    "steps of a word": (changed(steps="many"), "cat.safetensors"),
    "options of no JSON": (changed(options="{"), "cat.safetensors"),
    "options of a list": (changed(options="[1]"), "cat.safetensors"),
    "layers of others": (changed(layers='["a"]'), "cat.safetensors"),
    "deep layers": (changed(layers="[" * 100_000), "cat.safetensors"),
}


@pytest.mark.parametrize("case", CONTENTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_concept_that_makes_no_sense_is_named(bench, command, case):
    make, says = CONTENTS[case]
    make(bench.folder / "cat.safetensors", bench.concept)
    bench.refuse(command, *arguments(READERS[command], "cat.safetensors"), says=says)


MISFITS: dict[str, tuple[Callable[[Path, Path], object], str]] = {  # concepts that are whole, and fit no model here
    "another shape": (changed(reshaped), "cat.safetensors"),
    "another layer": (changed(lambda held: {f"{name}x": tensor for name, tensor in held.items()}), "cat.safetensors"),
    "unknown method": (changed(method="os.system"), "cat.safetensors"),
    "method of a path": (changed(method="../../x"), "cat.safetensors"),
    "unknown options": (changed(method="lora", options='{"code": "x"}'), "cat.safetensors"),
    "another architecture": (changed(base_architecture="sd15"), "sd15"),
    "unknown architecture": (changed(base_architecture="sd99"), "sd99"),
    "architecture of a path": (changed(base_architecture="../../etc/passwd"), "../../etc/passwd"),
}


@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.parametrize("command", ["txt2img", "metrics"])
def test_a_concept_of_another_model_is_refused(bench, command, case):
    make, says = MISFITS[case]
    make(bench.folder / "cat.safetensors", bench.concept)
    bench.refuse(command, *arguments(READERS[command], "cat.safetensors"), says=says)


def test_a_whole_concept_is_drawn_converted_and_described(bench):
    changed()(bench.folder / "cat.safetensors", bench.concept)
    bench.work("txt2img", *arguments(READERS["txt2img"], "cat.safetensors"), "--n_samples", "1", "--skip_grid")
    assert len(list((bench.folder / "out/samples").iterdir())) == 1
    assert json.loads(bench.work("inspect", "cat.safetensors").out)["kind"] == "concept"
    bench.work("convert", *arguments(READERS["convert"], "cat.safetensors"), "--form", "compact")
    assert (bench.folder / "out.safetensors").stat().st_size <= 11_264
