import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clipseg.training import ClipSegTraining
from clipseg.weights import POCKET_CONFIG
from data.pocket.classifier import SceneClassifier
from infusion.concepts.concept import Concept
from ldm.util.config import ROOT, instantiate, load_config, resolve
from scripts.demo import main
from scripts.infusion_txt2img import main as txt2img
from scripts.pocket import demo
from scripts.pocket.judge import CLIP_CONFIG, CLIP_WEIGHTS

ENTRY = """
include: [WIDE, ROOT/configs/method/infusion.yaml, ROOT/configs/data/photos.yaml]
superclass: dog
data_root: data/pocket/concepts/blue_striped_dog
batch_size: 2
trainer: {max_steps: 2, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 1}
callbacks: {samples: null}
"""


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> list[str]:
    """Flags that name judges and a CLIPSeg with random weights."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    clip = instantiate(resolve(load_config(ROOT / CLIP_CONFIG)).clip, "clip")
    decoder = ClipSegTraining(instantiate(resolve(load_config(ROOT / POCKET_CONFIG)).clipseg, "clipseg"), CLIP_WEIGHTS)
    weights = {"clip": clip.state_dict(), "classifier": SceneClassifier().state_dict(), "clipseg": decoder.weights()}
    flags = []
    for name, tensors in weights.items():
        save_file(tensors, folder / f"{name}.safetensors")
        flags += [f"--{name}", str(folder / f"{name}.safetensors")]
    return flags


@pytest.fixture
def wide(tiny: Path, tmp_path: Path) -> Path:
    """The tiny backbone, for pictures of the pocket world's size."""
    path = tmp_path / "wide.yaml"
    path.write_text(tiny.read_text().replace("image_size: 16", "image_size: 64"))
    return path


@pytest.fixture
def run(wide, judges, command, tmp_path, monkeypatch):
    """Runs the demo with training in this process."""
    entry = tmp_path / "entry.yaml"
    entry.write_text(ENTRY.replace("WIDE", str(wide)).replace("ROOT", str(ROOT)))
    monkeypatch.setattr(demo, "call", lambda words: command(*words[2:]) or 0)

    def start(*arguments: str) -> Path:
        outdir = tmp_path / "demo"
        main(["--base", str(entry), "--outdir", str(outdir), "--steps", "1", *judges, *arguments])
        return outdir

    return start


def difference(*files: Path) -> int:
    """The largest between the pixels of two pictures, of 255."""
    first, second = (np.asarray(Image.open(file)).astype(int) for file in files)
    return int(np.abs(first - second).max())


def test_everything_is_written_and_a_second_run_loses_nothing(run, wide, tmp_path):
    out = run("--concepts", "zigzag_hat", "--samples", "15", "--seed", "30", "learning_rate=0.5")
    concept = Concept.load(out / "concepts/zigzag_hat.safetensors")
    assert (concept.superclass, concept.steps, concept.learning_rate) == ("hat", 2, 0.5)
    for kind in ("base", "infusion", "attention"):
        files = sorted((out / "zigzag_hat" / kind).iterdir())
        assert [file.name for file in files] == [f"{i:05d}.png" for i in range(15)]
        with Image.open(files[3]) as image:
            assert image.size == (64, 64)
            prompt = "a cartoon of a hat on sand" if kind == "base" else "a cartoon of a {} on sand"
            wanted = {"kind": kind, "seed": "33", "prompt": prompt, "steps": "1", "scale": "5.0"}
            assert wanted.items() <= image.text.items()
    for kind in ("base", "infusion"):
        picture = out / f"zigzag_hat/{kind}/00003.png"
        txt2img(
            ["--from-png", str(picture), "--config", str(wide), "--device", "cpu", "--outdir", str(tmp_path / kind)]
        )
        assert difference(picture, tmp_path / kind / "samples/00000.png") <= 1
    with Image.open(out / "zigzag_hat/grid.png") as grid:
        assert grid.width > 14 * 128 and grid.height > 3 * 128

    results = json.loads((out / "results.json").read_text())
    (found,) = results["concepts"]
    assert found["level"] == 2 and found["numbers"] == concept.numbers == 256
    assert len(found["prompts"]) == 15 and len(set(found["prompts"])) == 14
    assert not any("water" in prompt for prompt in found["prompts"])  # the background of the photos
    assert set(found["figures"]) == {"similarity", "background", "style", "colour", "photos_background"}
    for metric in found["figures"].values():
        assert {"base", "infusion", "drawn", "difference"} <= set(metric)
        assert metric["base"]["n"] == metric["infusion"]["n"] == 15
    assert 0 < found["share"] < 10
    masks = sorted((out / "zigzag_hat/photos/mask").glob("*.png"))
    assert [mask.name for mask in masks] == [f"{i}.png" for i in range(5)]
    assert 0 < found["masks"]["value"] < 0.6 and found["masks"]["n"] == 5  # of random weights
    assert found["train_command"].endswith(f"data_root={out}/zigzag_hat/photos")
    assert results["settings"]["seeds"] == "30 to 44"

    html = (out / "report.html").read_text()
    assert "http" not in html and html.count("<figure") == 14 and html.count("data:image/png;base64,") == 5 + 3 * 14
    for words in (found["train_command"], found["sample_command"]):
        assert words.replace("'", "&#39;") in html

    words = shlex.split(found["sample_command"])[2:]
    txt2img([*words, "--config", str(wide), "--device", "cpu", "--outdir", str(tmp_path / "again")])
    assert difference(out / "zigzag_hat/infusion/00000.png", tmp_path / "again/samples/00000.png") <= 1

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run("--concepts", "other_fish", "--samples", "2", "--masks", "true")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    second = json.loads((tmp_path / "demo-2/results.json").read_text())
    assert [concept["name"] for concept in second["concepts"]] == ["other_fish"]
    assert second["concepts"][0]["masks"]["value"] == 1.0
    assert "colour" not in second["concepts"][0]["figures"]  # its colours are the drawing's own
    assert (tmp_path / "demo-2/report.html").read_text().count("<figure") == 2


def test_training_is_a_command_of_this_python(monkeypatch):
    calls = []

    def record(words: list[str]) -> subprocess.CompletedProcess:
        calls.append(words)
        return subprocess.CompletedProcess(words, 2)

    monkeypatch.setattr(demo.subprocess, "run", record)
    plan = demo.Plan("configs/pocket_demo.yaml", ("seed=1",), 4, 0, demo.Settings(), 4, Path("out"))
    with pytest.raises(SystemExit) as stop:
        demo.train("other_horse", Path("photos of it"), plan)
    assert stop.value.code == 2
    assert calls == [
        [sys.executable, str(ROOT / "main.py"), "--base", "configs/pocket_demo.yaml", "-t", "--logdir",
         "out/other_horse/run", "seed=1", "superclass=horse", "data_root=photos of it"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--clip", "nowhere.safetensors"], "error: nowhere.safetensors: no such file"),
        (["--clipseg", "nowhere.safetensors"], "there is no nowhere.safetensors"),
        (["--classifier", "nowhere.safetensors"], "error: nowhere.safetensors: no such file"),
        (["ckpt=nowhere.safetensors"], "error: nowhere.safetensors: no such file; get it from the shelf"),
        (["--base", "nowhere.yaml"], "error: nowhere.yaml: no such config file"),
        (["--concepts", "zigzag_hut"], "there is no `zigzag_hut`; did you mean `zigzag_hat`?"),
        (["--samples", "1"], "--samples: at least 2 are needed, not 1"),
        (["max_steps"], "override `max_steps`: write it as key=value"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(run, capsys, tmp_path, arguments, complaint):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and complaint in line
    assert not (tmp_path / "demo").exists()


def test_free_folder(tmp_path):
    assert demo.free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert demo.free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo/x").write_text("")
    (tmp_path / "demo-2").write_text("")
    assert demo.free_folder(tmp_path / "demo") == tmp_path / "demo-3"
