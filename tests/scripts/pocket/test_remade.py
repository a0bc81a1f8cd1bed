import json

import pytest

from scripts.pocket.remade import main


def said(**runs):
    return json.dumps({"methods": runs})


def write(path, **figures):
    estimates = {name: {"value": value, "stderr": error} for name, (value, error) in figures.items()}
    path.write_text(said(**{"infusion · hat · 1": {"figures": estimates}}))
    return str(path)


@pytest.mark.parametrize("again, code", [(0.5, 0), (0.53, 0), (0.54, 1), (0.46, 1)])
def test_within_the_interval_or_not(tmp_path, capsys, again, code):
    before = write(tmp_path / "before.json", clip_i=(0.5, 0.02), lfd_none=(0.0, 0.0), drift=(0.1, None))
    other = write(tmp_path / "again.json", clip_i=(again, 0.5), lfd_none=(0.0, 0.0))
    with pytest.raises(SystemExit) as stop:
        main([before, other])
    assert stop.value.code == code
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-4] for row in rows] == ["clip_i", "lfd_none"]
    assert float(rows[0][-1]) == pytest.approx(abs(again - 0.5) / 0.02, abs=0.01)


def test_a_zero_by_construction_has_to_stay_one(tmp_path):
    before, other = (write(tmp_path / f"{v}.json", lfd_none=(v, 0.0)) for v in (0.0, 0.001))
    with pytest.raises(SystemExit) as stop:
        main([before, other])
    assert stop.value.code == 1


def test_files_of_something_else(tmp_path, capsys):
    before = write(tmp_path / "before.json", clip_i=(0.5, 0.02))
    other = tmp_path / "other.json"
    none, nothing = "is no metrics.json", "no run is in both"
    for text, complaint in (("{", none), (said(x={}), none), (said(x={"figures": {}}), nothing)):
        other.write_text(text)
        with pytest.raises(SystemExit) as stop:
            main([before, str(other)])
        assert stop.value.code == 2 and complaint in capsys.readouterr().err
