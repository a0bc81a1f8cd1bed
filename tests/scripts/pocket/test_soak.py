import json

import pytest

from infusion.methods import method_names
from scripts.pocket.soak import Left, growth, main


def test_growth_is_the_slope_of_the_last_three_quarters():
    memory = [500, 900, 100, 110, 120, 130, 140, 150]  # the first two are of a process that warms up
    found = [Left(i, "lora", value, 7, 2) for i, value in enumerate(memory)]
    assert growth(found, "memory") == pytest.approx(10) and growth(found, "handles") == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_a_second_round_of_the_methods_leaves_no_handle_and_no_thread(tmp_path, capsys):
    count = len(method_names())
    main(["--concepts", str(2 * count), "--out", str(tmp_path / "soak.json")])
    found = json.loads((tmp_path / "soak.json").read_text())["concepts"]
    assert [left["method"] for left in found] == 2 * method_names()
    for name in ("handles", "threads"):
        assert {left[name] for left in found[count:]} == {found[count - 1][name]}
    assert found[-1]["memory"] < found[count - 1]["memory"] + 30e6  # another model would be 37 MB
    assert "handles" in capsys.readouterr().out
