"""Commands answer `--help` and a mistake in the flags before anything is imported that takes seconds."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = (  # as users type them
    *("main.py", "data/soft_segment.py", "data/estimate_C_inv.py"),
    *sorted(
        f"scripts/{path.name}"
        for path in (ROOT / "scripts").glob("*.py")
        if path.stem not in ("benchmark", "compare_forms", "coverage", "estimate_C_inv")
    ),
)
SLOW = {
    *("torch", "torchvision", "pytorch_lightning", "lightning_fabric", "tensorboard", "torchmetrics"),
    *("transformers", "diffusers", "open_clip", "kornia", "safetensors", "numpy", "scipy", "matplotlib", "pandas"),
}
RUNNER = """
import contextlib, io, json, runpy, sys
script, calls = sys.argv[1], json.loads(sys.argv[2])
said = []
for arguments in calls:
    sys.argv, out, err, code = [script, *arguments], io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    said.append([code, out.getvalue(), err.getvalue()])
json.dump({"said": said, "modules": sorted({name.partition(".")[0] for name in sys.modules})}, sys.stdout)
"""
NEEDED = {  # flags that a command does not go without
    "data/soft_segment.py": ["--image_dir", "nowhere", "--super_class", "cat"],
    "data/estimate_C_inv.py": ["--caption", "nowhere", "--save_path", "nowhere.safetensors"],
    "scripts/contributed.py": ["nowhere"],
    "scripts/convert_concept.py": ["nowhere", "nowhere.safetensors"],
    "scripts/experiment.py": ["nowhere.yaml"],
    "scripts/inspect_file.py": ["nowhere"],
    "scripts/metrics.py": ["--personalized_ckpt", "nowhere"],
}
DEFAULTS = {  # what the help says of a default
    "main.py": "where run folders <time>_<name> go (default: logs)",
    "data/soft_segment.py": "or pocket (default: ckpt/clipseg-rd64-refined)",
    "data/estimate_C_inv.py": "as a share of their mean (default: 0.001)",
    "scripts/convert_concept.py": "at most 11,264 bytes (default: full)",
    "scripts/demo.py": "weights of the pocket CLIP (default: ckpt/pocket/clip.safetensors)",
    "scripts/infusion_txt2img.py": "temperature of the gate, above 0 (default: 0.15)",
    "scripts/metrics.py": "LFD's groups over training steps (default: context,superclass)",
}
MISTAKES = {  # command -> flags and what is said of them
    "main.py": [
        (["--base", "a.yaml", "--seed", "x"], "-s/--seed: invalid int value: 'x'"),
        (["--base", "a.yaml", "--gpus", "0", "--devices", "1"], "--gpus and --devices: give one of the two"),
        (["-t"], "--base FILE starts a run"),
    ],
    "data/soft_segment.py": [
        (["--image_dir", "nowhere"], "required: --super_class"),
        ([*NEEDED["data/soft_segment.py"], "--batch_size", "0"], "--batch_size: `0` is not a whole number from 1"),
    ],
    "data/estimate_C_inv.py": [
        (["--caption", "nowhere"], "required: --save_path"),
        ([*NEEDED["data/estimate_C_inv.py"], "--type", "bert"], "--type: invalid choice: 'bert'"),
        ([*NEEDED["data/estimate_C_inv.py"], "--ridge=-1"], "--ridge: must be at least 0"),
        (["--caption", "nowhere", "--save_path", "C.pt"], "C.pt must end in .safetensors"),
    ],
    "scripts/convert_concept.py": [
        ([], "required: IN"),
        ([*NEEDED["scripts/convert_concept.py"], "--form", "tiny"], "--form: invalid choice: 'tiny'"),
        ([*NEEDED["scripts/convert_concept.py"], "--architecture", "sd9"], "--architecture: invalid choice: 'sd9'"),
    ],
    "scripts/demo.py": [
        (["--concepts", "zigzag_hut"], "did you mean `zigzag_hat`?"),
        (["--samples", "1"], "--samples: at least 2 are needed, not 1"),
    ],
    "scripts/experiment.py": [
        ([], "required: CONFIG"),
        (["nowhere.yaml", "--cores", "0"], "--cores: `0` is not a whole number from 1"),
        (["nowhere.yaml", "--cores", "1", "--address", "auto"], "--cores: a cluster has its own"),
        (["nowhere.yaml"], "nowhere.yaml: no such config file"),
    ],
    "scripts/infusion_txt2img.py": [
        (["--sampler", "heun"], "--sampler: invalid choice: 'heun'"),
        (["--beta", "0.7,x"], "--beta: `0.7,x` is not a number"),
        (["--gate", "hard"], "--gate: is of a concept, and no --personalized_ckpt is given"),
    ],
    "scripts/inspect_file.py": [([], "required: FILE")],
    "scripts/metrics.py": [
        ([], "required: --personalized_ckpt"),
        ([*NEEDED["scripts/metrics.py"], "--samples", "none"], "--samples: `none` is not a whole number from 1"),
        ([*NEEDED["scripts/metrics.py"], "--curve", "nouns"], "--curve: there is no group `nouns`"),
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_mistakes_need_nothing_that_is_slow_to_import(command):
    mistakes = [([*NEEDED.get(command, []), "--colour", "red"], "--colour"), *MISTAKES.get(command, [])]
    calls = json.dumps([["--help"], *(flags for flags, _ in mistakes)])
    environment = os.environ | {"COLUMNS": "400"}  # wide, so that no line of the help is broken
    runner = [sys.executable, "-c", RUNNER, command, calls]
    found = subprocess.run(runner, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)

    (code, text, error), *answers = answer["said"]
    assert code in (0, None) and error == "" and text.startswith("usage: ")
    assert DEFAULTS.get(command, "usage: ") in text and "(default: None)" not in text
    for (flags, wanted), (code, text, error) in zip(mistakes, answers, strict=True):
        assert code == 2 and text == "" and error.startswith("error: "), flags
        assert wanted in error and error.count("\n") == 1, error
    assert not SLOW & set(answer["modules"])


def concept_file(path: Path, architecture: str) -> Path:
    """The head of a concept file: as much as is read before what is slow."""
    header = json.dumps({"__metadata__": {"format": "infusion-concept", "base_architecture": architecture}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    return path


def missing(command: str, folder: Path) -> list[tuple[list[str], str]]:
    """Flags of a command that name what is not there, and what is said of it."""
    backbone, concept = folder / "backbone.yaml", concept_file(folder / "cat.safetensors", "pocket")
    lost = f"sd: {{params: {{checkpoint: {folder}/lost.safetensors}}}}\nckpt_source: the shelf\n"
    backbone.write_text(lost)
    training = ["--base", "configs/pocket_demo.yaml", "-t", "--basedir", f"{folder}/logs"]
    weights = [
        (["--ckpt", "gone.pt"], "--ckpt: there is no file gone.pt"),
        (["--part", "vae=gone.pt"], "--part: there is no file gone.pt"),
        (["--covariance", "gone.pt"], "gone.pt: there is no such covariance file"),
        (["--config", "gone.yaml"], "gone.yaml: no such config file"),
        (["--config", str(backbone)], "lost.safetensors; get it from the shelf, or name another"),
        (["--personalized_ckpt", "gone.pt"], "gone.pt: there is no such concept file"),
    ]
    own = {
        "main.py": [
            (["ckpt=gone.pt"], "ckpt: there is no file gone.pt; get it from this repository"),
            (["parts.vae=gone.pt"], "parts.vae: there is no file gone.pt"),
            (["data_root=gone"], "data_root: there is no folder gone"),
            (["covariance=gone.pt"], "there is no covariance file gone.pt"),
        ],
        "scripts/infusion_txt2img.py": [
            *weights,
            (["--from-file", "gone.txt"], "--from-file: gone.txt cannot be read"),
        ],
        "scripts/metrics.py": [
            *weights,
            (["--images", "gone"], "--images: there is no folder gone"),
            (["--clip", "gone"], "--clip: there is no folder gone"),
            (["--dino", "gone"], "--dino: there is no folder gone"),
            (["--lpips", "gone.pt"], "--lpips: there is no file gone.pt"),
            (["--clipseg", "gone"], "--clipseg: there is no folder gone"),
            (["--protocol", "gone.yaml"], "gone.yaml: no such config file"),
        ],
    }
    start = training if command == "main.py" else ["--personalized_ckpt", str(concept)]
    return [([*start, *flags], said) for flags, said in own[command]]


@pytest.mark.parametrize("command", ["main.py", "scripts/infusion_txt2img.py", "scripts/metrics.py"])
def test_a_missing_file_is_reported_before_anything_that_is_slow_to_import(command, tmp_path):
    mistakes = missing(command, tmp_path)
    runner = [sys.executable, "-c", RUNNER, command, json.dumps([flags for flags, _ in mistakes])]
    found = subprocess.run(runner, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    for (flags, wanted), (code, text, error) in zip(mistakes, answer["said"], strict=True):
        assert code == 2 and text == "" and error.startswith("error: "), (flags, error)
        assert wanted in error and error.count("\n") == 1, error
    assert not SLOW & set(answer["modules"])


def test_the_list_of_slow_modules_names_what_is_installed():
    """A name that is nothing's would be found nowhere, and prove nothing."""
    assert [name for name in sorted(SLOW) if find_spec(name) is None] == []
