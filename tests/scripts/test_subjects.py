"""The command, and what docs/protocol.md says to run."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import data.soft_segment
import scripts.metrics
import scripts.subjects
from infusion.metrics.run.protocol import Protocol
from infusion.metrics.run.subjects import dreambooth_prompts
from ldm.util.config import ROOT
from scripts.subjects import main

STUB = """#!/bin/bash
printf '%q ' "$(basename "$0")" "$@" >> calls; echo >> calls
case "$1" in
  scripts/subjects.py) cat table ;;
  main.py) if [ "$3" = --logdir ]; then mkdir -p "$4/models"; touch "$4/models/last.ckpt"; [ ! -e stopped ]; fi ;;
esac
"""
METHODS = ("infusion", "textual_inversion", "perfusion", "lora", "custom_diffusion", "dreambooth")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("bear_plushie", "can", "dog8"):
        (tmp_path / "dreambooth" / name).mkdir(parents=True)
        (tmp_path / "dreambooth" / name / "00.jpg").touch()
    return tmp_path / "dreambooth"


def test_a_line_for_each_subject(root, capsys):
    main([str(root), "--subjects", "dog8,bear_plushie"])
    assert capsys.readouterr().out == (
        f"dog8\tdog\t{root}/dog8\tconfigs/protocol/dreambooth_live.yaml\n"
        f"bear_plushie\tstuffed animal\t{root}/bear_plushie\tconfigs/protocol/dreambooth_object.yaml\n"
    )
    with pytest.raises(SystemExit, match="2"):
        main([str(root)])
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: backpack: there is no folder")


def test_protocols_are_written_for_prompts_that_none_has(tmp_path, capsys):
    (tmp_path / "photos/my_cat").mkdir(parents=True)
    (tmp_path / "photos/my_cat/0.png").touch()
    (tmp_path / "cat.txt").write_text("a {} in ice\nphoto of a {}\n")
    entry = {"class_prompt": "cat", "instance_data_dir": "photos/my_cat", "prompt_filename": "cat.txt"}
    (tmp_path / "dataset.json").write_text(json.dumps([entry]))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "error: --protocols: name a folder" in capsys.readouterr().err
    file, arguments = tmp_path / "out/my_cat.yaml", [str(tmp_path), "--protocols", str(tmp_path / "out")]
    main(arguments)
    assert capsys.readouterr().out == f"my_cat\tcat\t{tmp_path}/photos/my_cat\t{file}\n"
    protocol = Protocol.load(file)
    assert protocol.concept == ("a {} in ice", "photo of a {}")
    assert protocol == scripts.subjects.read(tmp_path)[0].as_protocol()
    main(arguments)  # again: the same prompts
    file.write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "my_cat.yaml exists already" in capsys.readouterr().err and file.read_text() == "mine"


@pytest.fixture
def calls(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Runs the page's blocks in an empty folder; their programs only note what they were called with."""
    main([str(root), "--subjects", "bear_plushie,can,dog8"])
    (tmp_path / "table").write_text(capsys.readouterr().out)
    (tmp_path / "bin").mkdir()
    for name in ("git", "python"):
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)
    blocks = "".join(re.findall(r"```bash\n(.*?)```", (ROOT / "docs/protocol.md").read_text(), re.DOTALL))

    def run() -> list[list[str]]:
        (tmp_path / "calls").unlink(missing_ok=True)
        (tmp_path / "photos").mkdir(exist_ok=True)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        subprocess.run(["bash", "-c", blocks], cwd=tmp_path, check=True, env={"PATH": path})
        return [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return run


def test_the_commands_of_the_page_are_what_the_programs_take(calls, root, monkeypatch):
    import main as training  # not above: it brings in Lightning's Trainer, and few tests run it

    noted, seen = calls(), {}
    monkeypatch.chdir(ROOT)
    for program, script, *arguments in noted:
        if program == "python":
            seen.setdefault(script, []).append(arguments)
    assert {script: len(found) for script, found in seen.items()} == {
        "scripts/subjects.py": 2,
        "data/soft_segment.py": 3,
        "main.py": 3 * len(METHODS),
        "scripts/metrics.py": 1,
    }
    for arguments in seen["scripts/subjects.py"]:
        scripts.subjects.parse(arguments)
    masks = [data.soft_segment.parse(arguments) for arguments in seen["data/soft_segment.py"]]
    assert [flags.super_class for flags in masks] == ["stuffed animal", "can", "dog"]
    runs = set()
    for arguments in seen["main.py"]:
        flags = training.parse(arguments)
        config = training.read_config(flags)
        name, method = Path(flags.logdir).parts[-2:]
        images = config.data.params.images.params
        assert flags.train and config.seed == 0 and method.removesuffix("-0") in METHODS
        assert images.data_root == str(root / name) and images.image_size == 512
        assert images.superclass == {"bear_plushie": "stuffed animal", "can": "can", "dog8": "dog"}[name]
        assert config.data.params.flip_p == (0 if name == "can" else 0.5)
        assert images.mask == ("auto" if method in ("infusion-0", "perfusion-0") else "none")
        prior = config.data.params.get("prior")
        assert (prior is not None) == (method in ("dreambooth-0", "custom_diffusion-0"))
        assert prior is None or prior.params.root == f"photos/classes/{images.superclass}"
        runs.add((name, method))
    assert len(runs) == 3 * len(METHODS)
    ((arguments,),) = (seen["scripts/metrics.py"],)
    flags = scripts.metrics.parse(arguments)
    columns = (flags.personalized_ckpt, flags.labels, flags.groups, flags.images, flags.protocol)
    rows = list(zip(*columns, strict=True))
    assert len(rows) == 3 * len(METHODS) and flags.samples == 100
    for run, label, group, images, protocol in rows:
        name, method = Path(run).parts[-2:]
        assert label == f"{name}/{method}" and group == method.removesuffix("-0") and images == str(root / name)
        assert Protocol.load(protocol).concept == dreambooth_prompts("live" if name == "dog8" else "object")


def test_the_training_loop_goes_on_where_it_was(calls, tmp_path):
    (tmp_path / "stopped").touch()  # every run ends badly
    first = [call for call in calls() if call[1] == "main.py"]
    (tmp_path / "stopped").unlink()
    second = [call for call in calls() if call[1] == "main.py"]
    assert [call[4] for call in first] == [call[4] for call in second] and len(second) == 3 * len(METHODS)
    assert all(call[3] == "--logdir" for call in first) and all(call[3] == "--resume" for call in second)
    assert not [call for call in calls() if call[1] == "main.py"]
    assert not list(tmp_path.glob("logs/dreambooth/*/*/models/last.ckpt"))
