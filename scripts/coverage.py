"""Do the reports' 95 % intervals hold the true difference in 95 % of experiments? Simulated, at the sizes used.

    python -m scripts.coverage                   # prints a table; of 4,000 experiments a share is known to 0.3 points

Each experiment has some concepts and three training seeds, two methods, and a figure whose law is known:

- likeness: normal, over concepts, seeds and samples;
- LFD: log-normal over concepts, as in results/pocket, where the ratio of two methods has a spread of 0.3 to 0.5;
- LFD, gamma: the same with a gamma law, whose logarithm is skewed the other way;
- a share of 96 samples, whose true value differs between concepts by a beta law.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from infusion.metrics.report.aggregate import difference
from ldm.util.cli import Parser, count, report

SIZES, SEEDS, SAMPLES = (5, 12), 3, 32
SPREAD, EFFECT, TRAINING = 0.35, 0.45, 0.06  # of log LFD: over concepts, of the methods' ratio, over seeds
LFD_STEP = 0.005 * np.exp((SPREAD**2 + TRAINING**2) / 2) * (2 * np.exp(EFFECT**2 / 2) - 1)  # mean difference
Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]  # -> values (concepts, seeds) of two methods


def likeness(rng: np.random.Generator, concepts: int) -> tuple[np.ndarray, np.ndarray]:
    """Two methods that differ by 0.05."""
    common = rng.normal(0.3, 0.08, (concepts, 1))
    ours, theirs = (common + rng.normal(step, 0.06, (concepts, 1)) for step in (0.05, 0.0))
    return tuple(one + rng.normal(0, 0.02, (concepts, SEEDS)) for one in (ours, theirs))


def lfd(rng: np.random.Generator, concepts: int) -> tuple[np.ndarray, np.ndarray]:
    """Two methods whose LFDs have the ratio 2."""
    common = rng.normal(np.log(0.005), SPREAD, (concepts, 1))
    ours = common + np.log(2) + rng.normal(0, EFFECT, (concepts, 1))
    return tuple(np.exp(one + rng.normal(0, TRAINING, (concepts, SEEDS))) for one in (ours, common))


def lfd_gamma(rng: np.random.Generator, concepts: int) -> tuple[np.ndarray, np.ndarray]:
    """The same, where each concept's ratio is gamma with the shape 5 and the geometric mean 2."""
    ratio = 2 * rng.gamma(5.0, size=(concepts, 1)) / np.exp(1.5061176684318003)  # digamma(5)
    common = np.exp(rng.normal(np.log(0.005), SPREAD, (concepts, 1)))
    return tuple(one * np.exp(rng.normal(0, TRAINING, (concepts, SEEDS))) for one in (common * ratio, common))


def shares(high: float, low: float, spread: float) -> Draw:
    """Two methods of these mean shares; the smaller `spread`, the more do concepts differ."""

    def draw(rng: np.random.Generator, concepts: int) -> tuple[np.ndarray, np.ndarray]:
        true = (rng.beta(mean * spread, (1 - mean) * spread, (concepts, 1)) for mean in (high, low))
        return tuple(rng.binomial(SAMPLES, np.repeat(one, SEEDS, 1)) / SAMPLES for one in true)

    return draw


CASES: dict[str, tuple[str, float, Draw]] = {  # title -> metric, true difference or ratio, law
    "likeness": ("identity", 0.05, likeness),
    "LFD": ("lfd_context", 2.0, lfd),
    "LFD, gamma": ("lfd_context", 2.0, lfd_gamma),
    "LFD, not as a ratio": ("drift", LFD_STEP, lfd),  # what the ratio is for
    "shares of 95 % and 80 %": ("noun", 0.15, shares(0.95, 0.8, 10)),
    "shares of 99 % and 90 %": ("noun", 0.09, shares(0.99, 0.9, 20)),
    "shares of 99.5 % and 99 %": ("noun", 0.005, shares(0.995, 0.99, 20)),
}


def results(values: np.ndarray, metric: str) -> list[dict]:
    """Values (concepts, seeds) as the results of runs."""
    return [
        {"world_concept": str(i), "photos": "", "training_seed": seed, "figures": {metric: {"value": float(value)}}}
        for i, row in enumerate(values)
        for seed, value in enumerate(row)
    ]


def coverage(metric: str, true: float, draw: Draw, concepts: int, experiments: int, seed: int = 0) -> dict[str, float]:
    """`covered`: of the intervals that were given, the share that holds the truth; `given`: of all experiments."""
    rng, given, covered = np.random.default_rng(seed), 0, 0
    for _ in range(experiments):
        ours, theirs = draw(rng, concepts)
        found = difference(results(ours, metric), results(theirs, metric), metric)
        given += found["low"] is not None
        covered += found["low"] is not None and found["low"] <= true <= found["high"]
    return {"covered": covered / given if given else float("nan"), "given": given / experiments}


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", type=count, help="of each case", default=4000)
    flags = parser.parse_args(arguments)
    rows = [
        {"figure": title, "concepts": concepts} | coverage(*case, concepts, flags.experiments)
        for title, case in CASES.items()
        for concepts in SIZES
    ]
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda share: f"{100 * share:.1f} %"))


if __name__ == "__main__":
    main()
