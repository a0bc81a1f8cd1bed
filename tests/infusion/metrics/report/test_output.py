import csv
import io
import json

import pytest
from PIL import Image

from infusion.metrics.report.output import Measured, check_folder, write
from ldm.util.cli import UserError
from ldm.util.files import locked
from tests.infusion.metrics.report.conftest import figure, result

SETTINGS = {"metrics": ["lfd"], "samples": 4}


def measured(*results, **changes):
    return Measured(results or (result(),), SETTINGS | changes, {"base": "abc"}, "python scripts/metrics.py")


def test_everything_is_written(tmp_path):
    page = write(tmp_path / "out", measured())
    assert page == tmp_path / "out/report.html" and page.read_text().startswith("<!doctype html>")
    said = json.loads((tmp_path / "out/metrics.json").read_text())
    about = said["methods"]["cat"]
    assert about["figures"]["lfd_context"]["value"] == 0.5 and about["figures"]["lfd_context"]["n"] == 4
    assert said["settings"] == SETTINGS and said["files"] == {"base": "abc"} and "pictures" not in about
    svg = (tmp_path / "out/plots/tradeoff_lfd.svg").read_text()
    assert svg.startswith("<?xml") and "</svg>" in svg
    assert Image.open(tmp_path / "out/side_by_side.png").width > 128
    assert not list(tmp_path.rglob("*.partial"))


def test_groups_have_figures_of_their_own_beside_the_runs():
    dog, car = (result(name, world_concept=name) for name in ("dog", "car"))
    dog["figures"]["clip_i"] = figure(0.5, base=figure(0.2), ceiling=figure(0.6))
    other = result("dog, other", "lora", world_concept="dog")
    said = measured(dog, car, other).as_dict()
    assert list(said["methods"]) == ["dog", "car", "dog, other"] and list(said["groups"]) == ["dreambooth", "lora"]
    assert said["methods"]["car"]["group"] == "dreambooth"
    first, second = said["groups"].values()
    assert set(first) == set(dog["figures"])
    against = {name: first["clip_i"].pop(name) for name in ("base", "ceiling")}
    assert first["clip_i"] == pytest.approx({"value": 0.4, "stderr": 0.1, "n": 2, "concepts": 2})
    assert against["base"] == pytest.approx({"value": 0.15, "stderr": 0.05, "n": 2, "concepts": 2})
    assert second["clip_i"]["difference"] == pytest.approx(
        {"scale": "difference", "value": -0.2, "low": None, "high": None, "p": None, "concepts": 1, "primary": True}
    )
    json.dumps(said["groups"], allow_nan=False)


def test_the_same_results_are_the_same_bytes_but_for_the_date(tmp_path):
    texts = []
    for name in ("a", "b"):
        write(tmp_path / name, measured())
        said = json.loads((tmp_path / name / "metrics.json").read_text())
        said.pop("date")
        texts.append((json.dumps(said), (tmp_path / name / "metrics.csv").read_bytes(),
                      (tmp_path / name / "plots/tradeoff_w2.svg").read_bytes()))  # fmt: skip
    assert texts[0] == texts[1]


def test_csv_has_a_line_for_each_figure():
    rows = list(csv.DictReader(io.StringIO(measured(result(), result("dog", "lora")).as_csv())))
    assert len(rows) == 2 * len(result()["figures"])
    line = next(row for row in rows if row["label"] == "dog" and row["metric"] == "w2_clip")
    assert line["group"] == "lora"
    wanted = {"method": "lora", "training_steps": "200", "value": "1.0", "low": "0.9", "floor": "0.4", "base": ""}
    assert wanted.items() <= line.items()
    assert next(row for row in rows if row["metric"] == "clip_i")["ceiling"] == "0.6"


def test_nothing_is_lost(tmp_path):
    out, subjects = tmp_path / "out", {"cat": "f" * 64}
    check_folder(out, subjects, SETTINGS)
    write(out, measured())
    check_folder(out, subjects, SETTINGS)
    check_folder(out, subjects | {"dog": "0"}, SETTINGS | {"metrics": ["lfd", "w2"], "batch_size": 9})
    for other, settings in (({"cat": "0"}, SETTINGS), ({}, SETTINGS), (subjects, SETTINGS | {"samples": 5}),
                            (subjects, SETTINGS | {"metrics": ["w2"]})):  # fmt: skip
        with pytest.raises(UserError, match="--out: .* has results of other concepts or settings"):
            check_folder(out, other, settings)


def test_no_result_hides_another():
    with pytest.raises(ValueError, match="two results are called 'cat'"):
        measured(result(), result("dog"), result())


def test_folders_of_something_else(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out: .* is a file"):
        check_folder(tmp_path / "file", {}, SETTINGS)
    with pytest.raises(UserError, match="--out: .* holds other files"):
        check_folder(tmp_path, {}, SETTINGS)
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match="is not of this command"):
        check_folder(tmp_path, {}, SETTINGS)
    (tmp_path / "killed/cache").mkdir(parents=True)
    check_folder(tmp_path / "killed", {}, SETTINGS)
    with locked(tmp_path / "begun"):  # by a first process, or by a command whose cache is elsewhere
        check_folder(tmp_path / "begun", {}, SETTINGS)
