import json

import pytest

from infusion.metrics.report.markdown import main, markdown
from tests.infusion.metrics.report.test_aggregate import figure, run

BASE = {"base": figure(0.5, 0.01)}


def results(*of_lora):
    """Infusion on three concepts, and LoRA with these values on the same."""
    concepts = ("cat", "dog", "owl")
    ours = [run(figure(0.1 + i / 100, **BASE), name, group="infusion") for i, name in enumerate(concepts)]
    return ours + [run(figure(value, **BASE), name) for value, name in zip(of_lora, concepts, strict=True)]


def test_a_row_for_each_group_and_what_it_is_read_against():
    lines = markdown(results(0.2, 0.3, 0.7), ["drift"]).splitlines()
    assert lines[0] == "|  | drift ↓ |" and lines[1] == "| --- | --- |"
    assert lines[2] == "| *base model* | 0.5000 ± 0.0058 |"
    assert lines[3:] == ["| infusion | 0.1100 ± 0.0058 |", "| lora | 0.40 ± 0.15 |"]


def test_an_asterisk_where_the_difference_from_the_first_group_is_beyond_chance():
    assert markdown(results(0.20, 0.21, 0.23), ["drift"]).splitlines()[-1].endswith("* |")
    assert "*" not in markdown(results(0.01, 0.1, 0.3), ["drift"]).splitlines()[-1]


def test_the_command_prints_a_file_s_table(tmp_path, capsys):
    path = tmp_path / "metrics.json"
    methods = {one["label"]: {key: value for key, value in one.items() if key != "label"} for one in results(1, 2, 3)}
    path.write_text(json.dumps({"methods": methods}))
    main([str(path), "--metrics", "drift"])
    assert capsys.readouterr().out.strip() == markdown(results(1, 2, 3), ["drift"])


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
