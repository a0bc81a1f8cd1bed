"""Results of several runs as one: the figures of a group, and how far each group is from the first.

A concept counts once, however often it was learned: the value of a group is the mean over concepts of the mean over
that concept's runs (seeds, lengths of training). Its standard error is over what is independent: over concepts, or over
the runs of one concept alone. Of a single run it is the figure's own, and so it is where all runs have the very same
figure (the base model's, or a rate of 100 %), carried through the mean over concepts.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from pathlib import Path

from scipy.special import stdtrit

from infusion.metrics.measures.estimate import mean
from infusion.metrics.report.plots import colours

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
        colour: in tables and plots.
        results: of its runs.
        figures: metric -> `value`, `stderr` (None: unknown), `n` runs, `concepts`; of what it is read against the same
            under `base`, `floor`, `ceiling`; of its distance from the first group under `difference`, see `difference`.
    """

    name: str
    label: str
    colour: str
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
    gathered: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        gathered[result["group"]].append(result)
    colour, single = colours(gathered), len(gathered) == len(results)
    first = next(iter(gathered.values()), [])
    groups = []
    for name, own in gathered.items():
        figures = figures_of(own)
        for metric, figure in figures.items():
            if own is not first and (found := difference(own, first, metric)):
                figure["difference"] = found
        groups.append(Group(name, own[0]["label"] if single else name, colour[name], own, figures))
    return groups


def figures_of(results: Sequence[Result]) -> dict[str, dict[str, object]]:
    """The common figures of results, without differences; see `Group.figures`."""
    figures = {}
    for metric in dict.fromkeys(metric for result in results for metric in result["figures"]):
        having = [result for result in results if metric in result["figures"]]
        concepts, found = map(concept_of, having), [result["figures"][metric] for result in having]
        known = list(zip(concepts, found, strict=True))
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
    values, concepts = [(concept, figure["value"]) for concept, figure in figures], dict(figures)
    if len({value for _, value in values}) == 1:
        own = [figure["stderr"] for figure in concepts.values()]
        found = {"value": values[0][1], "stderr": None if None in own else hypot(*own) / len(own)}
    else:
        found = mean(units(values)).as_dict()
    return found | {"n": len(figures), "concepts": len(concepts)}


def units(values: Sequence[tuple[str, float]]) -> list[float]:
    """What is independent of (concept, value): the concepts' means, or the values themselves of one concept alone."""
    concepts: dict[str, list[float]] = defaultdict(list)
    for concept, value in values:
        concepts[concept].append(value)
    return [mean(own).value for own in concepts.values()] if len(concepts) > 1 else [value for _, value in values]


def difference(results: Sequence[Result], reference: Sequence[Result], metric: str) -> dict[str, object] | None:
    """Mean of results − reference, run by run: what runs of one concept and training seed share cancels.

    Runs without a partner are left out; several of one concept and seed count as their mean.

    Returns:
        `value`; `stderr` as of a group's figure; `low` and `high`, the 95 % interval by Student's t with one degree of
        freedom less than there are concepts (pairs, of one concept alone); `n` pairs and `concepts`. One pair alone,
        or several that differ by the very same step of a rate, tell no error: it and the interval are None. None for
        no pair at all.
    """
    ours, theirs = (_by_training(own, metric) for own in (results, reference))
    pairs = [(key[0], ours[key] - theirs[key]) for key in ours if key in theirs]
    if not pairs:
        return None
    independent, count = units(pairs), {"n": len(pairs), "concepts": len(dict(pairs))}
    found = mean(independent)
    if found.n == 1 or (found.value and found.stderr < EQUAL * abs(found.value)):
        return {"value": found.value, "stderr": None, "low": None, "high": None} | count
    reach = found.stderr * float(stdtrit(found.n - 1, (1 + LEVEL) / 2))
    interval = {"low": found.value - reach, "high": found.value + reach}
    return {"value": found.value, "stderr": found.stderr} | interval | count


def _by_training(results: Sequence[Result], metric: str) -> dict[tuple[str, int | None], float]:
    """Values of a metric by concept and training seed."""
    values: dict[tuple[str, int | None], list[float]] = defaultdict(list)
    for result in results:
        if metric in result["figures"]:
            values[concept_of(result), result["training_seed"]].append(result["figures"][metric]["value"])
    return {key: mean(own).value for key, own in values.items()}
