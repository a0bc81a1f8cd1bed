import json

import pytest

from scripts.pocket.best_step import judge, main, table


def trials(*likenesses, base=0.1):
    return [{"step": 50 * i, "likeness": one, "base_likeness": base, "lfd": i / 100}
            for i, one in enumerate(likenesses, 1)]  # fmt: skip


RESULT = {"method": "lora", "concept": "zigzag_hat", "trials": trials(0.3, 0.6, 0.62, 0.5),
          "sweep": trials(0.35, 0.55, 0.6, 0.4)}  # fmt: skip


def test_the_trials_choose_and_the_sweep_judges():
    row = judge(RESULT)
    assert (row["pick"], row["gains most"]) == (100, 150)
    gains = [row[f"gain of the {name}"] for name in ("pick", "most", "last")]
    assert gains == pytest.approx([0.45, 0.5, 0.3]) and (row["LFD of the pick"], row["of the last"]) == (0.02, 0.04)


def test_the_command_reads_what_was_measured_before(tmp_path, capsys):
    path = tmp_path / "best_step.json"
    path.write_text(json.dumps([RESULT, RESULT | {"method": "infusion"}]))
    main(["--read", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == table([RESULT, RESULT | {"method": "infusion"}]).splitlines() and len(lines) == 5
    assert lines[2] == "| lora, zigzag hat | 100 | 150 | 0.450 | 0.500 | 0.300 | 0.0200 | 0.0400 |"
    assert lines[-1].startswith("| mean | 100 | 150 | 0.450 |")
