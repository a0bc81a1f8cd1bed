import json

import pytest

from infusion.metrics.report.aggregate import groups_of
from infusion.metrics.report.markdown import main
from infusion.metrics.report.tables import markdown, notes, table
from ldm.util.config import ROOT
from tests.infusion.metrics.report.conftest import study


@pytest.fixture
def file(tmp_path):
    methods = {one["label"]: {key: value for key, value in one.items() if key not in ("label", "pictures")}
               for one in study(infusion=0.4, lora=0.3)}  # fmt: skip
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"command": "x", "methods": methods}))
    return path


def test_the_command_prints_a_table_and_what_its_marks_mean(file, capsys):
    main([str(file), "--metrics", "clip_i,drift"])
    groups = groups_of(study(infusion=0.4, lora=0.3))
    assert capsys.readouterr().out.strip() == f"{markdown(table(groups, ['clip_i', 'drift']))}\n\n{notes(groups)}"


def test_statistics_and_plots_are_written_anew_and_what_was_measured_is_kept(file, capsys):
    before = json.loads(file.read_text())
    main([str(file), "--metrics", "clip_i", "--rewrite"])
    after = json.loads(file.read_text())
    assert after["groups"]["lora"]["clip_i"]["difference"]["p_holm"] < 0.01
    assert after.pop("groups") and after == before and (file.parent / "plots/tradeoff_lfd.svg").is_file()


def test_the_shipped_results_have_the_statistics_of_today():
    for name in ("results/pocket/metrics.json", "results/pocket/ablations/metrics.json"):
        said = json.loads((ROOT / name).read_text())
        groups = groups_of([{"label": label, **about} for label, about in said["methods"].items()])
        for group in groups:
            for metric, figure in group.figures.items():
                shipped = said["groups"][group.name][metric]
                assert shipped["value"] == pytest.approx(figure["value"])
                if "p_holm" in figure.get("difference", {}):
                    assert shipped["difference"]["p_holm"] == pytest.approx(figure["difference"]["p_holm"])


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (None, [], "is no metrics.json"),
        ("[]", [], "is no metrics.json"),
        ('{"methods": {}}', ["--metrics", "drift"], "--metrics: nothing has `drift`"),
    ],
)
def test_mistakes_are_one_line(content, words, message, tmp_path, capsys):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stop:
        main([str(path), *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in line
