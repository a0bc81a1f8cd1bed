"""Epochs of one training: which one to keep, and where overfitting begins, in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from infusion.metrics.measures.best import best_of, overfits_from, rises
from infusion.metrics.report.aggregate import KEEP, Result, likeness_of
from infusion.metrics.report.tables import listed, text
from infusion.metrics.report.words import CHANGE, metric_of

COSTS = {  # what overfitting costs -> its sign, and the same in words
    CHANGE: (1, "LFD around the concept rises"),
    "noun": (-1, "the share that keeps the noun falls"),
}


@dataclass(frozen=True)
class Epochs:
    """Results of the epochs of one training, in their order.

    The one to keep is the best by its gain, the likeness above the base model's own: a later one is better where it
    gains a tenth more than the best before. Overfitting begins at the first later one whose likeness does not rise
    beyond its error while LFD around the concept rises, or the share that keeps the noun falls, beyond theirs
    (`infusion.metrics.measures.best`).

    Attributes:
        training: what they are epochs of. results: at least two.
    """

    training: str
    results: Sequence[Result]

    @property
    def likeness(self) -> str | None:
        """The metric that chooses: a likeness that every one has."""
        return likeness_of(set.intersection(*(set(one["figures"]) for one in self.results)))

    @cached_property
    def kept(self) -> int | None:
        """Index of the one to keep; None where no likeness was measured, or none gains any."""
        if self.likeness is None:
            return None
        figures = [one["figures"][self.likeness] for one in self.results]
        return best_of([figure["value"] - figure["base"]["value"] for figure in figures])

    @cached_property
    def overfitted(self) -> int | None:
        """Index of the one at which overfitting begins; None where it is not seen."""
        if self.kept is None:
            return None
        return overfits_from(self.kept, self._values(self.likeness), list(self._costs.values()))

    def as_dict(self) -> dict[str, object]:
        """For JSON; a label of none is None."""
        label = lambda i: None if i is None else self.results[i]["label"]  # noqa: E731
        found = {"keep": label(self.kept), "overfitting_from": label(self.overfitted), "likeness": self.likeness}
        return found | {"labels": [one["label"] for one in self.results], "in_words": self.in_words()}

    def in_words(self) -> str:
        """What to keep, why, and where overfitting begins."""
        if self.likeness is None:
            return "Without a likeness no epoch can be chosen: --images names the photos."
        if self.kept is None:
            return "No epoch is more like the photos than the untouched model: there is none to keep."
        kept = self.results[self.kept]
        figure = kept["figures"][self.likeness]
        base = text(self.likeness, figure["base"])
        said = f"Keep {self._named(self.kept)}: {metric_of(self.likeness).title} {text(self.likeness, figure)}, "
        said += f"the untouched model has {base}. "
        if self.kept == len(self.results) - 1:
            return f"{said}It is the last one: longer training may bring more."
        if self.overfitted is None:
            return f"{said}No later one is seen to overfit."
        later = self.results[self.overfitted]["figures"]
        lost = [
            f"{COSTS[name][1]} from {text(name, kept['figures'][name])} to {text(name, later[name])}"
            for name, cost in self._costs.items()
            if rises(cost[self.kept], cost[self.overfitted])
        ]
        gained = f"likeness ({text(self.likeness, later[self.likeness])}) does not rise beyond its error"
        return f"{said}Overfitting begins at {self._named(self.overfitted)}: {gained} while {listed(lost)}."

    @cached_property
    def _costs(self) -> dict[str, list[tuple[float, float | None]]]:
        """Those of `COSTS` that every one has."""
        there = set.intersection(*(set(one["figures"]) for one in self.results))
        return {name: self._values(name, sign) for name, (sign, _) in COSTS.items() if name in there}

    def _values(self, metric: str, sign: int = 1) -> list[tuple[float, float | None]]:
        figures = [one["figures"][metric] for one in self.results]
        return [(sign * figure["value"], figure["stderr"]) for figure in figures]

    def _named(self, i: int) -> str:
        label, steps = self.results[i]["label"], self.results[i]["training_steps"]
        return f"{label} ({steps:,} steps)" if steps else label


def epochs_of(results: Sequence[Result]) -> list[Epochs]:
    """The trainings of which several epochs are among some results."""
    gathered: dict[str, list[Result]] = {}
    for result in results:
        if result.get("epoch_of"):
            gathered.setdefault(result["epoch_of"], []).append(result)
    ordered = {name: sorted(own, key=lambda one: one["epoch"]) for name, own in gathered.items()}
    return [Epochs(name, own) for name, own in ordered.items() if len(own) > 1]


def in_order(results: Sequence[Result]) -> list[Result]:
    """Results with each training's epochs in their order, where the first of them was, and the one to keep marked."""
    kept = {each.results[each.kept]["label"] for each in epochs_of(results) if each.kept is not None}
    results = [one | {KEEP: True} if one["label"] in kept else one for one in results]
    first = {}
    for i, result in enumerate(results):
        first.setdefault(result.get("epoch_of") or result["label"], i)
    return sorted(results, key=lambda one: (first[one.get("epoch_of") or one["label"]], one.get("epoch", 0)))
