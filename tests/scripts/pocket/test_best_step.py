import json

import pytest
import torch

from infusion.metrics.measures.balance import Trial
from scripts.pocket.best_step import compare, result, stops_at, table


def trial(step, likeness, lfd=0.02, noise=0.0):
    """32 samples; the ceiling is 0.9, the base model has 0.1, and `kept` is ½ where LFD is 0.02."""
    rows = torch.tensor([[likeness, 0.1, lfd, 0.02]] * 32, dtype=torch.float64)
    rows[:, 0] += noise * torch.randn(32, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return Trial(step, rows, ceiling=0.9, w2=1.0, floor=1.0)


def test_the_pick_is_as_much_lower_as_its_balance_is():
    same = compare(trial(100, 0.5), trial(100, 0.5))
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}
    worse = compare(trial(50, 0.3), trial(100, 0.5))  # gained ¼ and ½, kept ½ both
    assert worse["value"] == pytest.approx(0.5 - 2 * 0.25 * 0.5 / 0.75)
    noisy = compare(trial(50, 0.48, noise=0.3), trial(100, 0.5, noise=0.3))
    assert noisy["low"] < 0 < noisy["high"]  # too close to tell


@pytest.mark.parametrize(
    ("balances", "step"),
    [([0.1, 0.4, 0.3, 0.2, 0.5], 200), ([0.1, 0.2, 0.3, 0.4, 0.5], 250), ([0.1, 0.4, 0.3, 0.5, 0.2], 250)],
)
def test_early_stop_ends_after_two_trials_without_a_better_one(balances, step):
    assert stops_at([{"step": 50 * i, "balance": one} for i, one in enumerate(balances, 1)]) == step


def test_a_training_s_pick_is_read_from_its_run_and_held_against_the_sweep(tmp_path):
    (tmp_path / "models").mkdir()
    trials = [{"step": 50, "balance": 0.3}, {"step": 100, "balance": 0.2}]
    (tmp_path / "models/best.json").write_text(json.dumps({"best": 50, "trials": trials}))
    swept = [trial(50, 0.4), trial(100, 0.5), trial(150, 0.3)]
    found = result("lora", "zigzag_hat", tmp_path, swept)
    assert (found["pick"]["step"], found["best"]["step"], found["last"]["step"]) == (50, 100, 150)
    assert found["lower"]["value"] == pytest.approx(swept[1].balance - swept[0].balance)
    row = table([found]).splitlines()[2]
    assert row.startswith("| lora, zigzag hat | 50 | 100 | 0.43 | 0.50 | 0.07 ") and row.endswith("| 100 |")
