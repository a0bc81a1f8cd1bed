"""Concept files and base checkpoints that are neither, through the commands that read them."""

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.util.config import ROOT
from tests.bad_input.bench import LONGEST, POCKET

Make = Callable[[Path, Path], object]  # makes a file out of a good one
PHOTOS = str(ROOT / "data/pocket/concepts/blue_striped_dog")
CONCEPTS: dict[str, list[str]] = {  # command -> its flags; FILE is the concept file
    "txt2img": ["--personalized_ckpt", "FILE", "--outdir", "FOLDER/out", "--device", "cpu", "--steps", "1"],
    "inspect": ["FILE"],
    "convert": ["FILE", "FOLDER/out.safetensors"],
    "metrics": [
        *("--personalized_ckpt", "FILE", "--images", PHOTOS, "--metrics", "clip_i", "--samples", "2"),
        *("--steps", "1", "--out", "FOLDER/out", "--device", "cpu"),
    ],
}
BASES: dict[str, list[str]] = {  # command -> its flags; FILE is the checkpoint
    "txt2img": ["--config", POCKET, "--prompt", "a dog", "--outdir", "FOLDER/out", "--device", "cpu", "--ckpt", "FILE"],
    "main.py": [
        *("--base", str(ROOT / "configs/pocket_demo.yaml"), "-t", "--logdir", "FOLDER/run", "ckpt=FILE"),
        *("callbacks.samples=null", f"data_root={PHOTOS}"),
    ],
}


class Program:
    """Makes a file when it is unpickled by pickle."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch ran",)


def cut(share: float) -> Make:
    return lambda path, good: path.write_bytes(good.read_bytes()[: int(share * good.stat().st_size)])


def header(length: int, text: bytes = b"{}") -> Make:
    return lambda path, _: path.write_bytes(struct.pack("<Q", length) + text)


def sparse(path: Path, _: Path) -> None:
    """A header of 100 MB: the file says so, and is as long."""
    header(100_000_000, b"{")(path, _)
    os.truncate(path, 100_000_008)


def changed(tensors: Callable | None = None, **said: str | None) -> Make:
    """The good file with other tensors, or other metadata; None drops a key."""

    def make(path: Path, good: Path) -> None:
        with safe_open(good, "pt") as file:
            metadata = file.metadata() | said
        held = load_file(good)
        save_file(tensors(held) if tensors else held, path, {k: v for k, v in metadata.items() if v is not None})

    return make


def huge(path: Path, _: Path) -> None:
    """A tensor of 2**62 numbers, and none of them."""
    said = json.dumps({"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64]}}).encode()
    header(len(said), said)(path, _)


def lora(path: Path, _: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{name}.lora_down.weight": torch.zeros(4, 320), f"{name}.lora_up.weight": torch.zeros(320, 4)}, path)


def broken_folder(path: Path, _: Path) -> None:
    """A diffusers folder without weights."""
    (path / "unet").mkdir(parents=True)
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')


NEITHER: dict[str, Make] = {  # of a concept and of a base model
    "nothing": lambda path, _: None,
    "empty": lambda path, _: path.touch(),
    "cut at the start": cut(0.0005),
    "cut in the middle": cut(0.5),
    "cut at the end": cut(0.9999),
    "header of 2**60": header(2**60),
    "header of 2**63": header(2**63, b"{" * 100),
    "header of 100 MB": sparse,
    "header of no JSON": header(10, b"{nonsense}"),
    "deep header": header(20_000, b'{"a":' + b"[" * 19_995),
    "huge tensor": huge,
    "html": lambda path, _: path.write_text("<!doctype html><title>Sign in</title>"),
    "git-lfs": lambda path, _: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "folder": lambda path, _: path.mkdir(),
    "link to itself": lambda path, _: path.symlink_to(path),
    "pipe": lambda path, _: os.mkfifo(path),
    "pickle of a program": lambda path, _: path.write_bytes(pickle.dumps(Program())),
    "torch file of a program": lambda path, _: torch.save({"state_dict": Program()}, path),
    "old torch file of a program": lambda path, _: torch.save(
        {"state_dict": Program()}, path, _use_new_zipfile_serialization=False
    ),
}
NO_CONCEPT: dict[str, Make] = {  # whole files that hold no concept, or none of the pocket model
    "no tensors": changed(lambda held: {}),
    "nan": changed(lambda held: {name: torch.full_like(tensor, torch.nan) for name, tensor in held.items()}),
    "integers": changed(lambda held: {name: tensor.int() for name, tensor in held.items()}),
    "no metadata": lambda path, good: save_file(load_file(good), path),
    "newer version": changed(format_version="999"),
    "no superclass": changed(superclass=None),
    "templates of no JSON": changed(templates="[a"),
    "deep layers": changed(layers="[" * 100_000),
}
MISFITS: dict[str, Make] = {
    "another shape": changed(lambda held: {name: torch.zeros(7) for name in held}),
    "another layer": changed(lambda held: {f"{name}x": tensor for name, tensor in held.items()}),
    "unknown method": changed(method="os.system"),
    "method of a path": changed(method="../../x"),
    "unknown options": changed(method="lora", options='{"code": "x"}'),
}
NO_BASE: dict[str, Make] = {
    "another architecture": lambda path, good: save_file({n: torch.zeros(3) for n in list(load_file(good))[::2]}, path),
    "lora": lora,
    "no tensors": lambda path, _: torch.save({"state_dict": {}}, path),
    "broken folder": broken_folder,
}
FEW = ("nothing", "cut in the middle", "pickle of a program", "folder")  # through the other commands
CONCEPT_CASES = [("txt2img", case) for case in (*NEITHER, *NO_CONCEPT, *MISFITS)]
CONCEPT_CASES += [(command, case) for command in ("inspect", "convert", "metrics") for case in FEW]
CONCEPT_CASES += [(command, case) for command in ("convert", "metrics") for case in ("nan", "no superclass")]
CONCEPT_CASES += [("metrics", case) for case in ("another layer", "method of a path")]
BASE_CASES = [("txt2img", case) for case in (*NEITHER, *NO_BASE)] + [("main.py", case) for case in (*FEW, "lora")]


@pytest.mark.parametrize(("command", "case"), CONCEPT_CASES)
def test_a_file_that_is_no_concept_is_named(bench, command, case):
    (NEITHER | NO_CONCEPT | MISFITS)[case](bench.folder / "cat.safetensors", bench.concept)
    words = [word.replace("FILE", "cat.safetensors") for word in CONCEPTS[command]]
    bench.refuse(command, *words, says="cat.safetensors")
    assert not (bench.folder / "ran").exists()


@pytest.mark.parametrize(("command", "case"), BASE_CASES)
def test_a_file_that_is_no_base_model_is_named(bench, command, case):
    kind = "safetensors" if case.startswith(("cut", "header")) else "ckpt"
    path = bench.folder / f"base.{kind}"
    (NEITHER | NO_BASE)[case](path, ROOT / "ckpt/pocket/pocket.safetensors")
    bench.refuse(command, *[word.replace("FILE", str(path)) for word in BASES[command]], says=str(path))
    assert not (bench.folder / "ran").exists()


@pytest.mark.parametrize("architecture", ["sd15", "sd99", "../../etc/passwd"])
def test_a_concept_of_another_model_is_refused(bench, architecture):
    changed(base_architecture=architecture)(bench.folder / "cat.safetensors", bench.concept)
    for command in ("txt2img", "metrics"):
        words = [word.replace("FILE", "cat.safetensors") for word in CONCEPTS[command]]
        bench.refuse(command, *words, says=architecture)


def test_a_whole_concept_is_drawn_converted_and_described(bench):
    words = {command: [word.replace("FILE", "CONCEPT") for word in words] for command, words in CONCEPTS.items()}
    bench.work("txt2img", *words["txt2img"], "--n_samples", "1", "--skip_grid")
    assert len(list((bench.folder / "out/samples").iterdir())) == 1
    assert json.loads(bench.work("inspect", *words["inspect"]).out)["kind"] == "concept"
    bench.work("convert", *words["convert"], "--form", "compact")
    assert (bench.folder / "out.safetensors").stat().st_size <= 11_264


def state(path: Path, _: Path) -> None:
    """What `--resume` takes of a training of Infusion."""
    layer = "input_blocks.1.1.transformer_blocks.0.attn2"
    torch.save({"pytorch-lightning_version": "2.6", "global_step": 3, "state_dict": {layer: torch.zeros(32)}}, path)


def embedding(path: Path, _: Path) -> None:
    torch.save({"string_to_param": {"*": torch.zeros(1, 768)}}, path)


RECOGNISED: dict[str, tuple[Make, str]] = {  # what a file is -> what every command says of it
    "web page": (NEITHER["html"], "a web page, not the file that it links to"),
    "git-lfs": (NEITHER["git-lfs"], "a Git LFS pointer: get the file itself by `git lfs pull`"),
    "state": (state, "the state of a training, which main.py --resume continues"),
}
ELSEWHERE = {  # kinds that one of the two takes
    "lora": (lora, "a LoRA: a change to a base checkpoint"),
    "embedding": (embedding, "a textual inversion embedding: a change to a base checkpoint"),
}
MET = [(command, case) for command in ("txt2img", "convert", "metrics") for case in RECOGNISED]
MET += [("base of " + command, case) for command in BASES for case in RECOGNISED | ELSEWHERE]


@pytest.mark.parametrize(("command", "case"), MET)
def test_a_file_that_meets_the_wrong_flag_is_recognised(bench, command, case):
    make, says = (RECOGNISED | ELSEWHERE)[case]
    path = bench.folder / "file.ckpt"
    make(path, bench.concept)
    words = BASES[command[8:]] if command.startswith("base of ") else CONCEPTS[command]
    line = bench.refuse(command.removeprefix("base of "), *[w.replace("FILE", str(path)) for w in words], says=says)
    assert "damaged" not in line


def test_a_state_is_described(bench):
    state(bench.folder / "last.ckpt", bench.concept)
    said = json.loads(bench.work("inspect", "last.ckpt").out)
    assert said["kind"] == "training state" and "main.py --resume continues" in said["says"]


def test_a_run_folder_is_taken_for_its_last_concept_file(bench):
    models = bench.folder / "run/models"
    models.mkdir(parents=True)
    (bench.folder / "run/config.yaml").touch()
    for step in (100, 200):
        (models / f"step={step:06d}.safetensors").write_bytes(bench.concept.read_bytes())
    words = {command: [word.replace("FILE", "run") for word in words] for command, words in CONCEPTS.items()}
    bench.work("txt2img", *words["txt2img"], "--n_samples", "1", "--skip_grid")
    said = json.loads(bench.work("inspect", "out/samples/00000.png").out)
    assert said["kind"] == "picture" and said["made"]["personalized_ckpt"] == "run/models/step=000200.safetensors"
    assert said["made"]["prompt"] == "a photo of a {}" and said["made"]["seed"] == "42"
    assert json.loads(bench.work("inspect", "run").out)["file"] == "run/models/step=000200.safetensors"
    bench.work("convert", *words["convert"])
    assert (bench.folder / "out.safetensors").is_file()


def test_a_picture_that_says_nothing_of_itself_is_described(bench):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(bench.folder / "a.png")
    said = json.loads(bench.work("inspect", "a.png").out)
    assert said["kind"] == "picture" and "does not say how it was made" in said["says"] and "made" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("main.py", ["--base", "configs/pocket_demo.yaml", "-t", "--logdir", "FOLDER/run", "ckpt=FOLDER/x.ckpt"]),
        ("scripts/infusion_txt2img.py", ["--personalized_ckpt", "FOLDER/x.ckpt", "--outdir", "FOLDER/out"]),
    ],
)
def test_a_program_does_not_run_in_a_process_of_its_own(tmp_path, command, words):
    """As users start them; the seconds that imports take are no part of the promise."""
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(Program()))
    runner = [sys.executable, ROOT / command, *(word.replace("FOLDER", str(tmp_path)) for word in words)]
    found = subprocess.run(runner, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert found.returncode == 2, found.stderr
    *account, last = found.stderr.splitlines()
    assert last.startswith("error: ") and "x.ckpt" in last
    # a training says first what it takes of the photos
    assert len(account) == (command == "main.py") and all(": 5 photos of " in line for line in account)
    assert len(found.stderr) <= LONGEST
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"] and not (ROOT / "ran").exists()
