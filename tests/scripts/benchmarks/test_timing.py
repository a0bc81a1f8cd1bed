from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from scripts.benchmarks import timing
from scripts.benchmarks.timing import Case, count_flops, interleave, peak_flops, ratio, summarise, warm_up


class Clock:
    """A clock that goes on when it is told to, and notes what happens."""

    def __init__(self) -> None:
        self.now, self.events = 0.0, []

    def __call__(self) -> float:
        self.events.append("clock")
        return self.now

    def case(self, name: str, durations: list[float], steps: int = 1) -> Case:
        """A case that takes so long on each run; making ready and leaving take an hour."""
        remaining = iter(durations)

        @contextmanager
        def ready():
            self.now += 3600

            def run(given: int) -> None:
                self.events.append((name, given))
                self.now += next(remaining)

            yield run
            self.now += 3600

        return Case(name, ready, steps)


def test_cases_take_turns_and_only_their_runs_are_timed():
    clock, told = Clock(), []
    cases = [clock.case("a", [5.0, 1.0, 2.0]), clock.case("b", [7.0, 8.0, 90.0], steps=4)]
    seconds = interleave(cases, 3, lambda: clock.events.append("wait"), clock, told.append)
    assert seconds == {"a": [5, 1, 2], "b": [7, 8, 90]}
    assert told == ["a", "b"] * 3
    measured = [["wait", "clock", run, "wait", "clock"] for run in [("a", 1), ("b", 4)] * 3]
    assert clock.events == sum(measured, [])


def test_a_summary_has_the_median_and_the_quartiles():
    found = summarise([5.0, 1.0, 2.0, 4.0, 93.0])
    assert found == {"median_s": 4, "q1_s": 2, "q3_s": 5, "min_s": 1, "n": 5}
    assert summarise([3.0]) == {"median_s": 3, "q1_s": 3, "q3_s": 3, "min_s": 3, "n": 1}


def test_a_ratio_is_of_medians_and_its_spread_of_rounds():
    """The machine is ten times slower in the last round: in the ratios of rounds it leaves no trace."""
    found = ratio([2.0, 3.0, 20.0], [1.0, 1.5, 10.0])
    assert found == {"value": 2, "q1": 2, "q3": 2, "n": 3}
    assert ratio([1.0, 4.0, 4.0], [1.0, 2.0, 8.0]) == {"value": 2, "q1": 0.75, "q3": 1.5, "n": 3}


def layers(first: nn.Module, each: nn.Module, steps: int = 1, calls: list[int] | None = None) -> Case:
    """One layer, then another so many times."""

    @contextmanager
    def ready():
        def run(n: int) -> None:
            if calls is not None:
                calls.append(n)
            first(torch.ones(4, 8))
            for _ in range(n):
                each(torch.ones(4, 8))

        yield run

    return Case("layers", ready, steps)


def test_operations_are_counted_and_those_of_many_steps_follow_from_two():
    first, each, calls = nn.Linear(8, 16), nn.Linear(8, 3, bias=False), []
    one, step = 2 * 4 * 8 * 16, 2 * 4 * 8 * 3
    assert count_flops(layers(first, each)) == one + step
    assert count_flops(layers(first, each, 50, calls)) == one + 50 * step
    assert calls == [1, 2]


def test_operations_of_a_compiled_layer_are_counted():
    compiled = nn.Linear(8, 16)
    compiled.compile(backend="eager")
    compiled(torch.ones(4, 8))
    assert count_flops(layers(nn.Identity(), compiled)) == 2 * 4 * 8 * 16


def test_warming_up_takes_two_steps_at_most():
    calls = []
    for steps in (1, 2, 50):
        warm_up(layers(nn.Identity(), nn.Identity(), steps, calls))
    assert calls == [1, 2, 2]


def test_the_peak_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch):
    readings = iter(
        np.cumsum([0, 0.001, 1, 4, 1, 2, 1, 5, 1, 3, 1, 6])
    )  # a start and an end each, the first warming up
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(readings))
    monkeypatch.setitem(timing.PEAK_SIDE, "cpu", 64)
    found = peak_flops(torch.device("cpu"), torch.bfloat16)
    assert found["flops_per_s"] == pytest.approx(2 * 64**3 / 2)
    assert "64 × 64" in found["how"] and "bfloat16" in found["how"] and "5 products" in found["how"]
