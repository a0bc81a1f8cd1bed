"""Seconds and floating-point operations of cases that are measured in turn.

Of cases A, B, C that are compared, a round measures each once, and rounds follow one another: A B C A B C … So a
machine that slows down or is busy for a while does so for all of them. A ratio is that of the medians; its spread is
that of the ratios within each round, whose two sides were measured next to one another.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

PEAK_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices that the peak is measured by
PEAK_REPEATS = 5


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        name: of the case.
        ready: makes ready, not timed: within the `with`, a function that does `n` steps of the work.
        steps: how many of them are timed together.
    """

    name: str
    ready: Callable[[], AbstractContextManager[Callable[[int], object]]]
    steps: int = 1


def synchroniser(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done everything it was told to."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def interleave(
    cases: Sequence[Case],
    repeats: int,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Measure the cases in turn, `repeats` rounds of them; what has to be warmed up is warm already.

    Args:
        synchronise: called before each reading of the clock.
        clock: seconds.
        advance: told the name of each case when it has been measured, outside of what is timed.

    Returns:
        Name -> seconds, one for each round.
    """
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(repeats):
        for case in cases:
            with case.ready() as run:
                synchronise()
                start = clock()
                run(case.steps)
                synchronise()
                seconds[case.name].append(clock() - start)
            advance(case.name)
    return seconds


def warm_up(case: Case) -> None:
    """One step, or two of a case of several, which is all that is new in it."""
    with case.ready() as run:
        run(min(case.steps, 2))


def count_flops(case: Case) -> int:
    """Floating-point operations of a case, one multiplication and addition being two.

    Counted by formula from the shapes of matrix products, convolutions and attention
    (`torch.utils.flop_counter`); everything else counts nothing. What is recomputed counts again. Every step of a case
    does the same, so that n of them take F(n) = F(1) + (n - 1) (F(2) - F(1)).
    """
    counts = []
    for steps in (1, 2)[: case.steps]:
        eager = torch.compiler.set_stance("force_eager")  # the counter does not see into compiled code
        with case.ready() as run, eager, FlopCounterMode(display=False) as counter:
            run(steps)
        counts.append(counter.get_total_flops())
    return counts[0] + (case.steps - 1) * (counts[-1] - counts[0])


def peak_flops(device: torch.device, dtype: torch.dtype) -> dict[str, float | str]:
    """The most operations a second that the device is seen to do: those of the fastest of several matrix products.

    Returns:
        `flops_per_s`, and `how` it was measured, in words.
    """
    side, synchronise = PEAK_SIDE[device.type], synchroniser(device)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    seconds = []
    for _ in range(1 + PEAK_REPEATS):
        synchronise()
        start = time.perf_counter()
        torch.mm(a, b)
        synchronise()
        seconds.append(time.perf_counter() - start)
    name = str(dtype).removeprefix("torch.")
    how = f"fastest of {PEAK_REPEATS} products of two {side} × {side} matrices in {name}"
    return {"flops_per_s": 2 * side**3 / min(seconds[1:]), "how": how}


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, minimum and number of measurements."""
    q1, median, q3 = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
    return {"median_s": median, "q1_s": q1, "q3_s": q3, "min_s": min(seconds), "n": len(seconds)}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Ratio of the medians, and the quartiles of the ratios within each round."""
    q1, q3 = np.quantile(np.divide(numerator, denominator), [0.25, 0.75]).tolist()
    return {"value": float(np.median(numerator) / np.median(denominator)), "q1": q1, "q3": q3, "n": len(numerator)}
