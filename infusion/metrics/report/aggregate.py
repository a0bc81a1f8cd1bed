"""Results of several runs as one: the figures of a group, and how far each group is from the first.

The unit is the concept, with its training seeds nested: the value of a group is the mean over concepts of the mean over
that concept's runs. There are two primary endpoints, likeness and LFD around the concept; their differences from the
first group, all together, are corrected by Holm (1979). Everything else is exploratory.

Intervals are paired Student's t over concepts. LFDs, which are skewed, are compared by their ratio (t of its
logarithm): `python -m scripts.coverage` shows that the plain difference holds the truth in 91 % only.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from infusion.metrics.report.words import CHANGE, LIKENESS, READ_AGAINST, metric_of

LEVEL = 0.95  # of the intervals of differences, and one minus the level of tests
EQUAL = 1e-9  # share of a value within which others are the same but for rounding
EDGE = 0.03  # two shares whose mean is nearer to 0 or 1 have no interval: Student's t covers too little there
KEEP, STAR = "keep", "★"  # what marks the epoch to keep: a result's key, and in its label
CONCEPTS, SAMPLES = "over concepts", "over the samples of a run"  # what an error is over
Result = Mapping[str, Any]  # see infusion.metrics.run.evaluate.evaluate
Figure = Mapping[str, Any]  # value, stderr and more


@dataclass(frozen=True)
class Group:
    """Results that belong together.

    Attributes:
        name: that its runs were given, by default their method.
        label: what a report calls it: its name, or that of its run where no group of the report has more than one.
        kind: "concept", "words" (the base model told the concept in words) or "pictures" (made elsewhere).
        results: of its runs.
        figures: metric -> `value`, `stderr` (None: unknown), `n` runs, `concepts`; what it is read against, in the same
            form, under `base`, `floor`, `ceiling`, `ceiling_decoded`; under `difference` its distance from the first
            group, under `words` that from the words, see `difference`.
    """

    name: str
    label: str
    kind: str
    results: Sequence[Result]
    figures: Mapping[str, Figure]

    @property
    def anchored(self) -> bool:
        """Whether prompts without the concept give the base model's prediction, whatever was learned."""
        return all(result.get("anchored", False) for result in self.results)

    @property
    def keep(self) -> bool:
        """Whether it has the epoch of a training that is to be kept."""
        return any(result.get(KEEP, False) for result in self.results)

    @property
    def concepts(self) -> list[str]:
        return list(dict.fromkeys(map(concept_of, self.results)))


def concept_of(result: Result) -> str:
    """What a run learned: a concept of the pocket world, else its folder of photos, else its superclass."""
    photos = result["photos"]
    return result["world_concept"] or (str(Path(photos)) if photos else result["superclass"])


def likeness_of(figures: Mapping[str, object]) -> str | None:
    """The metric of likeness that is a primary endpoint: the first of `LIKENESS` that was measured."""
    return next((name for name in LIKENESS if name in figures), None)


def errors_over(results: Sequence[Result]) -> str:
    """What every ± of a report is over: concepts, or samples where no group has more than one concept."""
    concepts = pd.DataFrame({"group": one["group"], "concept": concept_of(one)} for one in results)
    return CONCEPTS if len(concepts) and concepts.groupby("group")["concept"].nunique().max() > 1 else SAMPLES


def groups_of(results: Sequence[Result]) -> list[Group]:
    """Results by their `group`, in the order of the first of each, with all differences."""
    gathered: dict[str, list[Result]] = {}
    for result in results:
        gathered.setdefault(result["group"], []).append(result)
    over, groups = errors_over(results), []
    for name, own in gathered.items():
        label = own[0]["label"] if len(gathered) == len(results) else name
        group = Group(name, label, own[0].get("kind") or "concept", own, figures_of(own, over))
        groups.append(replace(group, label=f"{label} {STAR}") if group.keep else group)
    words = next((group for group in groups if group.kind == "words"), None)
    for group in groups:
        for metric, figure in group.figures.items():
            if group is not groups[0] and (found := difference(group.results, groups[0].results, metric)):
                figure["difference"] = found | {"primary": metric in (likeness_of(groups[0].figures), CHANGE)}
            if words and group is not words and (found := difference(group.results, words.results, metric)):
                figure["words"] = found
    tested = [figure["difference"] for group in groups for figure in group.figures.values() if "difference" in figure]
    tested = [one for one in tested if one["primary"] and one["p"] is not None]
    for one, p in zip(tested, holm([one["p"] for one in tested]), strict=True):
        one["p_holm"] = p
    return groups


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down (1979)."""
    order = np.argsort(ps)
    steps = np.maximum.accumulate(np.sort(ps) * np.arange(len(ps), 0, -1)).clip(max=1)
    return steps[np.argsort(order)].tolist()


def figures_of(results: Sequence[Result], over: str) -> dict[str, dict[str, Any]]:
    """The common figures of results, without differences; see `Group.figures`."""
    figures = {}
    for metric in dict.fromkeys(metric for result in results for metric in result["figures"]):
        known = [(concept_of(result), result["figures"][metric]) for result in results if metric in result["figures"]]
        figures[metric] = gather(known, over)
        for which in READ_AGAINST:
            if against := [(concept, figure[which]) for concept, figure in known if which in figure]:
                figures[metric][which] = gather(against, over)
    return figures


def gather(figures: Iterable[tuple[str, Figure]], over: str) -> dict[str, Any]:
    """One figure of several.

    Args:
        figures: concept and figure of each run, at least one.
        over: `CONCEPTS`: the error is that of the mean over concepts, unknown for one concept and where all have the
            same figure. `SAMPLES`: the runs' own; runs share prompts and seeds, so it does not fall with their number.

    Returns:
        `value`, `stderr` (None: unknown), `n` runs and `concepts`.
    """
    rows = [(concept, figure["value"], figure["stderr"]) for concept, figure in figures]
    runs = pd.DataFrame(rows, columns=["concept", "value", "stderr"]).astype({"value": float, "stderr": float})
    means = runs.groupby("concept", sort=False)["value"].mean()
    value, stderr = means.mean(), means.sem() if over == CONCEPTS else np.sqrt((runs["stderr"] ** 2).mean(skipna=False))
    known = stderr > EQUAL * abs(value)  # false for NaN
    return {"value": value, "stderr": float(stderr) if known else None, "n": len(runs), "concepts": len(means)}


def difference(results: Sequence[Result], reference: Sequence[Result], metric: str) -> dict[str, Any] | None:
    """How far results are from reference: concept by concept, over the training seeds that both have.

    A result without a training seed (words, pictures made elsewhere) is paired with every seed of its concept.

    Returns:
        `value`, the mean of results − reference, or where `scale` is "ratio" (an LFD, positive everywhere) the
        geometric mean of results / reference; `low`, `high` and `p` on that scale by Student's t over concepts, None
        where there is one concept, where all differ by the very same, and for shares near 0 or 1 (`EDGE`); `concepts`.
        None for no common concept.
    """
    ours, theirs = (_values(rows, metric) for rows in (results, reference))
    pairs = [pair for concept in ours if concept in theirs and (pair := _means(ours[concept], theirs[concept]))]
    if not pairs:
        return None
    ours, theirs = np.array(pairs).T
    ratio = metric.startswith("lfd") and bool((np.minimum(ours, theirs) > 0).all())
    steps = np.log(ours / theirs) if ratio else ours - theirs
    middle = (ours.mean() + theirs.mean()) / 2
    edge = metric_of(metric).percent and not EDGE <= middle <= 1 - EDGE
    test = {"low": None, "high": None, "p": None} if edge else paired_t(steps)
    scaled = {"value": steps.mean(), "low": test["low"], "high": test["high"]}
    found = {name: float(np.exp(v)) if ratio and v is not None else v for name, v in scaled.items()}
    return {"scale": "ratio" if ratio else "difference", **found, "p": test["p"], "concepts": len(pairs)}


def paired_t(steps: np.ndarray) -> dict[str, float | None]:
    """`low`, `high` and `p` of the mean of differences (n,) by Student's t; None where they tell no error."""
    if len(steps) < 2 or np.std(steps) <= max(EQUAL, EQUAL * abs(np.mean(steps))):
        return {"low": None, "high": None, "p": None}
    found = stats.ttest_1samp(steps, 0.0)
    interval = found.confidence_interval(LEVEL)
    return {"low": float(interval.low), "high": float(interval.high), "p": float(found.pvalue)}


def beyond(found: Figure | None) -> bool:
    """Whether a difference is beyond chance: by Holm where it is primary, else by its own interval."""
    if not found or found["p"] is None:
        return False
    return found.get("p_holm", found["p"]) < 1 - LEVEL


def _values(results: Sequence[Result], metric: str) -> dict[str, dict[int | None, list[float]]]:
    """Values of a metric by concept and training seed (None: unknown)."""
    known: dict[str, dict[int | None, list[float]]] = {}
    for one in results:
        if metric in one["figures"]:
            seeds = known.setdefault(concept_of(one), {})
            seeds.setdefault(one["training_seed"], []).append(one["figures"][metric]["value"])
    return known


def _means(ours: Mapping, theirs: Mapping) -> tuple[float, float] | None:
    """Two means over the training seeds that both have, or over all where one side has none; None for no such seed."""
    free = None in ours or None in theirs
    seeds = [seed for seed in {**ours, **theirs} if free or (seed in ours and seed in theirs)]
    if not seeds:
        return None
    return tuple(float(np.mean([np.mean(one[seed]) for seed in seeds if seed in one])) for one in (ours, theirs))
