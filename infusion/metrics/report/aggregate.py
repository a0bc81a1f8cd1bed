"""Results of several runs as one: the figures of a group, and how far each group is from the first.

A concept counts once, however often it was learned: the value of a group is the mean over concepts of the mean over
that concept's runs (seeds, lengths of training). Its standard error is over what is independent: over concepts, or over
the runs of one concept alone. Of a single run it is the figure's own, and so it is where all runs have the very same
figure (the base model's, or a rate of 100 %), carried through the mean over concepts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from infusion.metrics.measures.estimate import mean

READ_AGAINST = ("base", "floor", "ceiling")
LEVEL = 0.95  # of the intervals of differences
EQUAL = 1e-9  # share of a value within which others are the same but for rounding
Result = Mapping[str, object]  # see infusion.metrics.run.evaluate.evaluate
Figure = Mapping[str, object]  # value, stderr and more


@dataclass(frozen=True)
class Group:
    """Results that belong together.

    Attributes:
        name: that its runs were given, by default their method.
        label: what a report calls it: its name, or that of its run where no group of the report has more than one.
        results: of its runs.
        figures: metric -> `value`, `stderr` (None: unknown), `n` runs, `concepts`; what it is read against, in the same
            form, under `base`, `floor`, `ceiling`; its distance from the first group under `difference`, see there.
    """

    name: str
    label: str
    results: Sequence[Result]
    figures: Mapping[str, Figure]

    @property
    def anchored(self) -> bool:
        """Whether prompts without the concept give the base model's prediction, whatever was learned."""
        return all(result["anchored"] for result in self.results)

    @property
    def concepts(self) -> list[str]:
        return list(dict.fromkeys(map(concept_of, self.results)))


def concept_of(result: Result) -> str:
    """What a run learned: a concept of the pocket world, else its folder of photos, else its superclass."""
    photos = result["photos"]
    return result["world_concept"] or (str(Path(photos)) if photos else result["superclass"])


def groups_of(results: Sequence[Result]) -> list[Group]:
    """Results by their `group`, in the order of the first of each."""
    gathered: dict[str, list[Result]] = {}
    for result in results:
        gathered.setdefault(result["group"], []).append(result)
    groups, reference = [], next(iter(gathered.values()), [])
    for name, own in gathered.items():
        figures = figures_of(own)
        for metric, figure in figures.items():
            if own is not reference and (found := difference(own, reference, metric)):
                figure["difference"] = found
        label = own[0]["label"] if len(gathered) == len(results) else name
        groups.append(Group(name, label, own, figures))
    return groups


def figures_of(results: Sequence[Result]) -> dict[str, dict[str, object]]:
    """The common figures of results, without differences; see `Group.figures`."""
    figures = {}
    for metric in dict.fromkeys(metric for result in results for metric in result["figures"]):
        known = [(concept_of(result), result["figures"][metric]) for result in results if metric in result["figures"]]
        figures[metric] = gather(known)
        for which in READ_AGAINST:
            if against := [(concept, figure[which]) for concept, figure in known if which in figure]:
                figures[metric][which] = gather(against)
    return figures


def gather(figures: Sequence[tuple[str, Figure]]) -> dict[str, object]:
    """One figure of several.

    Args:
        figures: concept and figure of each run, at least one.

    Returns:
        `value`, `stderr` (None: unknown), `n` runs and `concepts`.
    """
    rows = [(concept, figure["value"], figure["stderr"]) for concept, figure in figures]
    runs = pd.DataFrame(rows, columns=["concept", "value", "stderr"]).astype({"stderr": float})
    if runs["value"].nunique() == 1:
        errors = runs.drop_duplicates("concept", keep="last")["stderr"]
        value, stderr = float(runs["value"].iloc[0]), float(np.linalg.norm(errors)) / len(errors)
    else:
        found = mean(independent(runs.set_index("concept")["value"]))
        value, stderr = found.value, found.stderr
    count = {"n": len(runs), "concepts": runs["concept"].nunique()}
    return {"value": value, "stderr": None if isnan(stderr) else stderr} | count


def independent(values: pd.Series) -> list[float]:
    """The means of the concepts, which the index names, or the values themselves where there is one concept."""
    concepts = values.groupby("concept", sort=False).mean()
    return (concepts if len(concepts) > 1 else values).tolist()


def difference(results: Sequence[Result], reference: Sequence[Result], metric: str) -> dict[str, object] | None:
    """Mean of results − reference, run by run: what runs of one concept and training seed share cancels.

    Runs without a partner are left out; several of one concept and seed count as their mean.

    Returns:
        `value`; `stderr` as of a group's figure; `low` and `high`, the 95 % interval by Student's t with one degree of
        freedom less than there are concepts (pairs, of one concept alone); `n` pairs and `concepts`. One pair alone,
        or several that differ by the very same step of a rate, tell no error: it and the interval are None. None for
        no pair at all.
    """
    pairs = (_by_training(results, metric) - _by_training(reference, metric)).dropna()
    if pairs.empty:
        return None
    found, count = mean(independent(pairs)), {"n": len(pairs), "concepts": pairs.index.unique("concept").size}
    if found.n == 1 or (found.value and found.stderr < EQUAL * abs(found.value)):
        return {"value": found.value, "stderr": None, "low": None, "high": None} | count
    reach = found.stderr * float(stdtrit(found.n - 1, (1 + LEVEL) / 2))
    interval = {"low": found.value - reach, "high": found.value + reach}
    return {"value": found.value, "stderr": found.stderr} | interval | count


def _by_training(results: Sequence[Result], metric: str) -> pd.Series:
    """Values of a metric by concept and training seed (-1: unknown)."""
    rows = [
        (concept_of(result), -1 if result["training_seed"] is None else result["training_seed"], figure["value"])
        for result in results
        if (figure := result["figures"].get(metric))
    ]
    runs = pd.DataFrame(rows, columns=["concept", "seed", "value"]).astype({"value": float})
    return runs.groupby(["concept", "seed"])["value"].mean()
