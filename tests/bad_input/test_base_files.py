"""Weights of base models that are none, through the commands that load them."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.util.config import ROOT
from tests.bad_input.bench import LONGEST, POCKET
from tests.bad_input.test_concept_files import Program, cut, header, sparse

WEIGHTS = ROOT / "ckpt/pocket/pocket.safetensors"
DRAW = ["--config", POCKET, "--prompt", "a dog", "--outdir", "FOLDER/out", "--device", "cpu", "--steps", "1"]
TRAIN = [
    *("--base", ROOT / "configs/pocket_demo.yaml", "-t", "--logdir", "FOLDER/run", "callbacks.samples=null"),
    f"data_root={ROOT}/data/pocket/concepts/blue_striped_dog",
]
READERS = {"txt2img": [*DRAW, "--ckpt", "FOLDER/FILE"], "main.py": [*TRAIN, "ckpt=FOLDER/FILE"]}


def program(path: Path, _: Path) -> None:
    path.write_bytes(pickle.dumps(Program()))


def other(path: Path, good: Path) -> None:
    """Half of the tensors, and of other shapes."""
    held = load_file(good)
    save_file({name: torch.zeros(3) for name in list(held)[::2]}, path)


def lora(path: Path, _: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{name}.lora_down.weight": torch.zeros(4, 320), f"{name}.lora_up.weight": torch.zeros(320, 4)}, path)


def empty_folder(path: Path, _: Path) -> None:
    path.mkdir()


def broken_folder(path: Path, _: Path) -> None:
    """A diffusers folder without weights."""
    (path / "unet").mkdir(parents=True)
    (path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')


FILES: dict[str, tuple[str, Callable[[Path, Path], object]]] = {  # name, and what makes it
    "nothing": ("x.ckpt", lambda path, _: None),
    "empty": ("x.ckpt", lambda path, _: path.touch()),
    "cut at the start": ("x.safetensors", cut(0.0001)),
    "cut in the middle": ("x.safetensors", cut(0.5)),
    "cut at the end": ("x.safetensors", cut(0.9999)),
    "header of 2**60": ("x.safetensors", header(2**60)),
    "header of 100 MB": ("x.safetensors", sparse),
    "pickle of a program": ("x.ckpt", program),
    "torch file of a program": ("x.ckpt", lambda path, _: torch.save({"state_dict": Program()}, path)),
    "old torch file of a program": (
        "x.ckpt",
        lambda path, _: torch.save({"state_dict": Program()}, path, _use_new_zipfile_serialization=False),
    ),
    "another architecture": ("x.safetensors", other),
    "lora": ("x.safetensors", lora),
    "no tensors": ("x.ckpt", lambda path, _: torch.save({"state_dict": {}}, path)),
    "html": ("x.ckpt", lambda path, _: path.write_text("<!doctype html><title>Sign in</title>")),
    "git-lfs": ("x.ckpt", lambda path, _: path.write_text("version https://git-lfs.github.com/spec/v1\noid s\n")),
    "empty folder": ("x", empty_folder),
    "broken folder": ("x", broken_folder),
    "link to itself": ("x.ckpt", lambda path, _: path.symlink_to(path)),
    "pipe": ("x.ckpt", lambda path, _: os.mkfifo(path)),
}


TRAINED = ("nothing", "cut in the middle", "pickle of a program", "lora", "html", "empty folder")
CASES = [("txt2img", case) for case in FILES] + [("main.py", case) for case in TRAINED]


@pytest.mark.parametrize(("command", "case"), CASES)
def test_weights_that_are_none_are_named(bench, command, case):
    name, make = FILES[case]
    make(bench.folder / name, WEIGHTS)
    words = [str(word).replace("FILE", name) for word in READERS[command]]
    bench.refuse(command, *words, says=str(bench.folder / name))
    assert not (bench.folder / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("main.py", ["--base", "configs/pocket_demo.yaml", "-t", "--logdir", "FOLDER/run", "ckpt=FOLDER/x.ckpt"]),
        (
            "scripts/infusion_txt2img.py",
            ["--config", POCKET, "--prompt", "a", "--outdir", "FOLDER/o", "--ckpt=FOLDER/x.ckpt"],
        ),
        ("scripts/infusion_txt2img.py", ["--personalized_ckpt", "FOLDER/x.ckpt", "--outdir", "FOLDER/out"]),
        ("scripts/convert_concept.py", ["FOLDER/x.ckpt", "FOLDER/y.safetensors", "--superclass", "cat"]),
        ("scripts/inspect_file.py", ["FOLDER/x.ckpt"]),
        ("scripts/metrics.py", ["--personalized_ckpt", "FOLDER/x.ckpt", "--out", "FOLDER/out"]),
    ],
)
def test_a_program_does_not_run_in_a_process_of_its_own(tmp_path, command, words):
    """As users start them; the seconds that imports take are no part of the promise."""
    program(tmp_path / "x.ckpt", WEIGHTS)
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runner = [sys.executable, ROOT / command, *words]
    found = subprocess.run(runner, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=100)
    assert found.returncode == 2, found.stderr
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1 and "x.ckpt" in found.stderr
    assert len(found.stderr) <= LONGEST
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"] and not (ROOT / "ran").exists()
