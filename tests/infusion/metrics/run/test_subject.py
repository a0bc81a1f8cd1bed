import os
from dataclasses import replace

import pytest
import torch

from infusion.concepts.concept import Concept
from infusion.gate import Gate
from infusion.metrics.run.subject import Checkpoint, Subject, best_step, load_subjects
from ldm.util.cli import UserError
from ldm.weights.checkpoint import sha256
from scripts.metrics import main

CONCEPT = Concept({"layer": torch.ones(3)}, "cat", ("a {}",), "tiny", steps=7, date="then")


@pytest.fixture
def run(tmp_path):
    """A run folder with the files of three steps."""
    for step in (200, 40, 1000):
        concept = replace(CONCEPT, steps=step, tensors={"layer": torch.full((3,), float(step))})
        concept.save(tmp_path / f"logs/cat_run/models/step={step:06d}.safetensors")
    (tmp_path / "logs/cat_run/models/last.ckpt").write_bytes(b"")
    return tmp_path / "logs/cat_run"


def test_a_run_stands_for_its_files_in_the_order_of_training(run):
    (subject,) = load_subjects([str(run)])
    assert subject.label == "cat_run" and subject.concept.steps == 1000
    assert [one.concept.steps for one in subject.checkpoints] == [40, 200, 1000]
    assert subject.last.sha256 == sha256(run / "models/step=001000.safetensors")
    (single,) = load_subjects([str(run / "models/step=000040.safetensors")])
    assert single.label == "cat_run" and [one.concept.steps for one in single.checkpoints] == [40]


def test_labels(run, tmp_path):
    CONCEPT.save(tmp_path / "dog.safetensors")
    paths = [str(run), str(tmp_path / "dog.safetensors")]
    assert [one.label for one in load_subjects(paths)] == ["cat_run", "dog"]
    assert [one.label for one in load_subjects(paths, ["a", "b"])] == ["a", "b"]
    with pytest.raises(ValueError, match="--labels: 1 for 2"):
        load_subjects(paths, ["a"])
    with pytest.raises(ValueError, match="--labels: two are called 'dog'"):
        load_subjects([paths[1], paths[1]])


def test_groups(run, tmp_path, capsys):
    CONCEPT.save(tmp_path / "dog.safetensors")
    paths = [str(run), str(tmp_path / "dog.safetensors")]
    assert [one.about()["group"] for one in load_subjects(paths)] == ["infusion", "infusion"]  # the method
    assert [one.about()["group"] for one in load_subjects(paths, groups=["a", "b"])] == ["a", "b"]
    replace(CONCEPT, architecture="pocket").save(tmp_path / "pocket.safetensors")  # whose weights there are
    paths[0] = str(tmp_path / "pocket.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(["--personalized_ckpt", ",".join(paths), "--groups", "a,b,c", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err == "error: --groups: 3 for 2 rows; give one for each\n"


def test_what_is_no_concept(tmp_path):
    with pytest.raises(ValueError, match="no such concept file"):
        load_subjects([str(tmp_path / "nothing.safetensors")])
    with pytest.raises(ValueError, match="no diffusers folder"):
        load_subjects([str(tmp_path)])


def test_a_concept_in_memory_is_known_by_its_contents():
    first, same = Checkpoint.of(CONCEPT), Checkpoint.of(replace(CONCEPT, date="later"))
    assert first.sha256 == same.sha256 and len(first.sha256) == 64
    changes = ({"tensors": {"layer": torch.zeros(3)}}, {"steps": 8}, {"noun": "x"})
    others = [replace(CONCEPT, **change) for change in changes]
    assert len({Checkpoint.of(one).sha256 for one in others} | {first.sha256}) == 4


def test_which_methods_leave_prompts_without_the_concept_alone(subject):
    nature = {name: subject(name).anchored for name in
              ("infusion", "p_plus", "textual_inversion", "lora", "dreambooth", "custom_diffusion")}  # fmt: skip
    assert [name for name, anchored in nature.items() if anchored] == ["infusion", "p_plus", "textual_inversion"]
    everywhere = replace(subject("perfusion").concept, gate=Gate("global"))
    assert not Subject("global", (Checkpoint.of(everywhere),)).anchored


def test_one_photo_is_not_enough():
    subject = Subject("cat", (Checkpoint.of(CONCEPT),))
    with pytest.raises(ValueError, match="--images: folder .*fewer than 2"):
        subject.with_photos(torch.zeros(1, 3, 8, 8), "folder")
    known = subject.with_photos(torch.zeros(2, 3, 8, 8), "folder")
    assert known.about()["photos"] == "folder" and known.about()["training_steps"] == 7


@pytest.mark.parametrize("word", ["a\nb", "\x1b[2J", "\udcff", "x" * 5000])
def test_names_that_no_report_can_show_are_refused_before_anything_is_measured(tmp_path, word):
    CONCEPT.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="--labels: a report cannot show the name") as raised:
        load_subjects([str(tmp_path / "c.safetensors")], [word])
    assert len(str(raised.value)) < 600 and "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="--groups: a report cannot show"):
        load_subjects([str(tmp_path / "c.safetensors")], ["c"], [word])


def test_a_file_whose_name_is_no_text(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")
    CONCEPT.save(path)
    with pytest.raises(ValueError, match="--personalized_ckpt: a report cannot show the name"):
        load_subjects([path], ["c"])


def test_the_step_that_a_run_marked_as_its_best_is_told(tmp_path):
    file = str(tmp_path / "step=000400.safetensors")
    assert best_step(file) is None and best_step("") is None
    (tmp_path / "best.json").write_text('{"best": 150, "trials": []}')
    assert best_step(file) == 150
    (tmp_path / "best.json").write_text("[]")
    with pytest.raises(UserError, match="remove it"):
        best_step(file)
