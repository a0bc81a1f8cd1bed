from dataclasses import replace

import pytest
import torch

from infusion.concepts.concept import Concept
from infusion.metrics.run.epochs import as_epochs
from infusion.metrics.run.subject import Checkpoint, Subject, load_subjects

CONCEPT = Concept({"layer": torch.ones(3)}, "dog", ("a {}",), "tiny", method="lora", attention="own", seed=7)


def rows(folder, files, **settings):
    """Subjects of files, name -> steps, or name -> changes of the concept."""
    found = []
    for name, changes in files.items():
        changes = changes if isinstance(changes, dict) else {"steps": changes}
        file = folder / f"{name}.safetensors"
        found.append(Subject(name, (Checkpoint(replace(CONCEPT, **changes), "0", str(file)),), **settings))
    return found


def order(subjects):
    """Labels in the order of their training."""
    return [one.label for one in sorted(as_epochs(subjects), key=lambda one: one.epoch) if one.training]


@pytest.mark.parametrize(
    ("files", "ordered"),
    [
        ({"c": 300, "a": 100, "b": 200}, ["a", "b", "c"]),
        ({"rex-000010": 0, "rex": 0, "rex-000002": 0}, ["rex-000002", "rex-000010", "rex"]),  # sd-scripts' last
        ({"rex_step9": 0, "rex_step10": 0}, ["rex_step9", "rex_step10"]),
        ({"rex-1": 200, "rex-2": 100}, ["rex-2", "rex-1"]),  # what the file says counts
        ({"rex-1": 0, "max-2": 0}, []),
        ({"a": 100, "b": 100}, []),
        ({"a": 100}, []),
        ({"a": {"steps": 100}, "b": {"steps": 200, "seed": 8}}, []),
        ({"a": {"steps": 100}, "b": {"steps": 200, "options": {"rank": 8}}}, []),
        ({"a": {"steps": 100}, "b": {"steps": 200, "superclass": "cat"}}, []),
    ],
)
def test_epochs_are_files_of_one_training_in_the_order_of_their_steps(tmp_path, files, ordered):
    assert order(rows(tmp_path, files)) == ordered


def test_the_order_given_stays_and_each_is_a_group_of_its_own(tmp_path):
    found = as_epochs(rows(tmp_path, {"b": 200, "a": 100}))
    assert [(one.label, one.group, one.training, one.epoch) for one in found] == [
        ("b", "b", "b", 2),
        ("a", "a", "b", 1),
    ]
    assert [one.about()["epoch"] for one in found] == [2, 1]
    assert [one.group for one in as_epochs(rows(tmp_path, {"b": 200, "a": 100}, group="mine"))] == ["mine", "mine"]


def test_other_folders_photos_and_runs_are_apart(tmp_path):
    first, second = rows(tmp_path / "x", {"a": 100}), rows(tmp_path / "y", {"b": 200})
    assert order(first + second) == []
    (one,), (two,) = (rows(tmp_path, {name: steps}, photos_from=name) for name, steps in (("a", 100), ("b", 200)))
    assert order([one, two]) == []
    run = replace(first[0], checkpoints=first[0].checkpoints * 2)
    assert order([run, *rows(tmp_path / "x", {"b": 200})]) == []


def test_adapters_that_are_called_alike_are_known_by_their_folders(tmp_path):
    subjects = []
    for name in ("checkpoint-1000", "checkpoint-500"):
        subjects += [replace(one, label=name) for one in rows(tmp_path / name, {"pytorch_lora_weights": 0})]
    assert order(subjects) == ["checkpoint-500", "checkpoint-1000"]


def test_files_of_one_run_have_names_of_their_own(tmp_path):
    files = [tmp_path / f"run/models/step={step:06d}.safetensors" for step in (10, 20)]
    for file, step in zip(files, (10, 20), strict=True):
        replace(CONCEPT, steps=step).save(file)
    found = load_subjects([*map(str, files)])
    assert order(found) == ["run step=000010", "run step=000020"]
