"""Run folders in place of concept files."""

import logging

import pytest

from infusion.concepts.runs import concept_file, concept_files
from ldm.util.cli import UserError


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "models").mkdir(parents=True)
    (folder / "config.yaml").touch()
    return folder


def test_the_files_of_a_run_are_in_the_order_of_training(run, caplog):
    names = ["step=000100.safetensors", "step=000200.safetensors", "step=001000.safetensors"]
    for name in [*names, "best.safetensors", "last.ckpt"]:
        (run / "models" / name).touch()
    assert [file.name for file in concept_files(run)] == names == [file.name for file in concept_files(run / "models")]
    caplog.set_level(logging.INFO)
    assert concept_file(run) == run / "models" / names[-1]
    assert caplog.messages == [f"{run}: step=001000.safetensors, the last of 3 concept files"]


def test_a_file_and_a_folder_of_another_tool_stay_what_they_are(tmp_path, caplog):
    (tmp_path / "unet").mkdir()
    for path in (tmp_path / "a.safetensors", tmp_path):
        assert concept_files(path) == [path] and concept_file(path) == path
    assert not caplog.messages


def test_a_run_without_a_concept_or_with_many_is_named(run):
    with pytest.raises(UserError, match="has not reached its first concept file"):
        concept_files(run)
    for name in ("cat", "dog"):
        (run / "models" / name).mkdir()
        (run / "models" / name / "step=000100.safetensors").touch()
    with pytest.raises(UserError, match="a run of 2 concepts: name one of them, such as .*models/cat"):
        concept_files(run)
    assert concept_files(run / "models/dog") == [run / "models/dog/step=000100.safetensors"]
