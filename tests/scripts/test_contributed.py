"""Results of others are checked by what they say of themselves."""

import json
import shutil

import pytest

from ldm.util.config import ROOT
from scripts.contributed import main

FORM = {
    "card": "NVIDIA A100",
    "commit": "0123456789" * 4,
    "command": "python scripts/experiment.py configs/experiment/pocket.yaml --out x",
    "hours": 4.5,
    "by": "somebody",
    "notes": "",
}


@pytest.fixture
def folder(tmp_path):
    """The shipped results of the pocket comparison, as measured by this version, with a form."""
    from infusion.metrics.report.markdown import read
    from infusion.metrics.report.output import Measured

    said = json.loads((ROOT / "results/pocket/metrics.json").read_text())
    rows = read(ROOT / "results/pocket/metrics.json")[:4]
    measured = Measured(rows, said["settings"], said["files"], said["command"])
    (tmp_path / "metrics.json").write_text(json.dumps(measured.as_dict()))
    (tmp_path / "metrics.csv").write_text(measured.as_csv())
    (tmp_path / "form.yaml").write_text(json.dumps(FORM))
    return tmp_path


def test_what_is_complete_is_said_to_be(folder, capsys):
    main([str(folder)])
    assert capsys.readouterr().out == f"{folder}: complete, and its figures agree with each other\n"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"card": ""}, "card: fill it in"),
        ({"commit": "main"}, "commit: the 40 digits"),
        ({"command": "python mine.py"}, "command: a python scripts/experiment.py"),
        ({"hours": "long"}, "hours: fill it in"),
        ({"gpu": "x"}, "`gpu` is unknown"),
    ],
)
def test_a_form_that_is_not_filled_in_is_one_line(folder, changed, message, capsys):
    (folder / "form.yaml").write_text(json.dumps(FORM | changed))
    with pytest.raises(SystemExit, match="2"):
        main([str(folder)])
    assert f"form.yaml: {message}" in capsys.readouterr().err


def test_figures_that_were_edited_are_found(folder, capsys):
    said = json.loads((folder / "metrics.json").read_text())
    row = next(iter(said["methods"].values()))
    row["figures"]["clip_i"]["value"] += 0.1
    (folder / "metrics.json").write_text(json.dumps(said))
    with pytest.raises(SystemExit, match="2"):
        main([str(folder)])
    assert "metrics.json: `groups` are not what its rows give" in capsys.readouterr().err


def test_another_table_or_none_is_found(folder, capsys):
    shutil.copyfile(ROOT / "results/pocket/metrics.csv", folder / "metrics.csv")
    with pytest.raises(SystemExit, match="2"):
        main([str(folder)])
    (folder / "metrics.csv").unlink()
    with pytest.raises(SystemExit, match="2"):
        main([str(folder)])
    said = capsys.readouterr().err
    assert "metrics.csv: is not of this metrics.json" in said and "there is no metrics.csv" in said


def test_another_base_model_is_noted(folder, capsys):
    said = json.loads((folder / "metrics.json").read_text())
    said["settings"]["architecture"] = "sd15"
    (folder / "metrics.json").write_text(json.dumps(said))
    main([str(folder)])
    assert "note: the base model is not the published SD 1.5" in capsys.readouterr().out


def test_photos_that_were_left_out_are_noted(folder, capsys):
    said = json.loads((folder / "metrics.json").read_text())
    label, row = next(iter(said["methods"].items()))
    row |= {"photos_used": 4, "photos_left_out": 3}
    (folder / "metrics.json").write_text(json.dumps(said))
    main([str(folder)])
    assert f"note: {label}: 4 photos were used, 3 left out: say in `notes` why" in capsys.readouterr().out
