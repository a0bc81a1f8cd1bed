import json

import pytest

from scripts.pocket.remade import compare, main


def run(value, stderr, label="lora · hat · 0"):
    return {"label": label, "figures": {"clip_i": {"value": value, "stderr": stderr}}}


@pytest.mark.parametrize(("errors", "apart"), [((0.03, 0.04), 2.0), ((0.0, 0.05), 2.0), ((None, 0.1), 1.0)])
def test_a_difference_is_judged_by_both_errors(errors, apart):
    found = compare([run(0.5, errors[0])], [run(0.4, errors[1]), run(9.0, 1.0, "other")])
    assert found["apart"].tolist() == pytest.approx([apart])


def test_the_command_counts_and_names_what_is_apart(tmp_path, capsys):
    for name, value in (("again", 0.5), ("before", 0.4)):
        one = run(value, 0.03)
        (tmp_path / name).write_text(json.dumps({"methods": {one.pop("label"): one}}))
    main([str(tmp_path / "again"), "--against", str(tmp_path / "before")])
    said = capsys.readouterr().out
    assert said.startswith("0 of 1 figures are within 1.96 errors of the difference") and "lora · hat · 0" in said
    with pytest.raises(SystemExit):
        main([str(tmp_path / "again")])
    assert "has no run and metric" in capsys.readouterr().err
