"""Subjects of published benchmarks, and what docs/protocol.md says to run."""

import json
import re
import shlex
from pathlib import Path

import pytest

import main as training
import scripts.experiment
import scripts.experiments.config
from infusion.metrics.run.protocol import Protocol
from infusion.metrics.run.subjects import dreambooth_prompts, read
from ldm.util.cli import UserError
from ldm.util.config import ROOT
from scripts.experiments.config import Subject, arguments, known_subjects, read_experiment

METHODS = ("infusion", "textual_inversion", "perfusion", "lora", "custom_diffusion", "dreambooth")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("bear_plushie", "can", "dog8"):
        (tmp_path / "dreambooth" / name).mkdir(parents=True)
        (tmp_path / "dreambooth" / name / "00.jpg").touch()
    return tmp_path / "dreambooth"


def test_protocols_are_written_for_prompts_that_none_has(tmp_path):
    (tmp_path / "photos/my_cat").mkdir(parents=True)
    (tmp_path / "photos/my_cat/0.png").touch()
    (tmp_path / "cat.txt").write_text("a {} in ice\nphoto of a {}\n")
    entry = {"class_prompt": "cat", "instance_data_dir": "photos/my_cat", "prompt_filename": "cat.txt"}
    (tmp_path / "dataset.json").write_text(json.dumps([entry]))
    (subject,) = known_subjects(str(tmp_path), None, tmp_path / "out")
    file = tmp_path / "out/my_cat.yaml"
    assert subject == Subject("my_cat", f"{tmp_path}/photos/my_cat", "cat", str(file))
    protocol = Protocol.load(file)
    assert protocol.concept == ("a {} in ice", "photo of a {}") and protocol == read(tmp_path)[0].as_protocol()
    known_subjects(str(tmp_path), None, tmp_path / "out")  # again: the same prompts
    file.write_text("mine")
    with pytest.raises(UserError, match="my_cat.yaml exists already"):
        known_subjects(str(tmp_path), None, tmp_path / "out")
    assert file.read_text() == "mine"


def test_the_commands_of_the_page_are_what_the_program_takes(root, tmp_path, monkeypatch):
    """On the photos of three subjects, with weights that are not looked into."""
    page = (ROOT / "docs/protocol.md").read_text()
    commands = [
        shlex.split(line, comments=True) for line in re.findall(r"^python scripts/experiment.py.*$", page, re.M)
    ]
    plan, run = (scripts.experiment.parse(words[2:]) for words in commands)
    assert plan.plan and not run.plan and plan.config == run.config
    monkeypatch.setattr(scripts.experiments.config, "check", lambda experiment: None)  # weights, and other photos
    names = f"subjects.names=[{','.join(('bear_plushie', 'can', 'dog8'))}]"
    text = (ROOT / run.config).read_text()
    chosen = tmp_path / "dreambooth.yaml"
    chosen.write_text("\n".join(line for line in text.splitlines() if "berry" not in line and "  clock" not in line
                                and "  rc_car" not in line))  # fmt: skip
    experiment = read_experiment(str(chosen), [f"subjects.from={root}", names], tmp_path)
    assert [variant.name for variant in experiment.variants] == list(METHODS)
    for variant, subject, seed in experiment.runs():
        config = training.read_config(training.parse(arguments(variant, subject, seed, subject.folder)))
        images = config.data.params.images.params
        assert images.data_root == str(root / subject.name) and images.image_size == 512 and config.seed == 0
        assert images.superclass == {"bear_plushie": "stuffed animal", "can": "can", "dog8": "dog"}[subject.name]
        assert config.data.params.flip_p == (0 if subject.name == "can" else 0.5)
        assert images.mask == ("auto" if variant.name in ("infusion", "perfusion") else "none")
        prior = config.data.params.get("prior")
        assert (prior is not None) == (variant.name in ("dreambooth", "custom_diffusion"))
        prompts = dreambooth_prompts("live" if subject.name == "dog8" else "object")
        assert Protocol.load(subject.protocol).concept == prompts
    assert experiment.measure["samples"] == 4 * len(prompts)
