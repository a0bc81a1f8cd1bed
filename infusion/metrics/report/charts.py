"""The plots of an evaluation: trade-offs, LFD over training and over the noise."""

from collections import defaultdict
from collections.abc import Sequence

from infusion.metrics.report.aggregate import Figure, Group, Result, concept_of, figures_of, gather
from infusion.metrics.report.plots import GREY, Point, Series, curves, plane
from infusion.metrics.report.words import METRICS
from infusion.metrics.run.protocol import CONTEXT, PLAIN

FIDELITY = ("dino", "clip_i", "clip_t")  # the first that there is goes on the plane
DISTANCES = ("w2_clip", "w2_latent")
PLOTS = {  # name -> heading and caption
    "tradeoff_lfd": (
        "Fidelity against change around the concept",
        "Up: the concept is drawn more faithfully. Right: more has changed outside it.",
    ),
    "tradeoff_w2": (
        "Fidelity against distance from the untouched model’s samples",
        "The base model stands at the floor: two batches of its own samples are that far apart.",
    ),
    "training_context": ("Change around the concept while it was learned", "LFD of every concept file of the run."),
    "training_superclass": ("Change of the plain noun while it was learned", "LFD of every concept file of the run."),
    "timesteps_context": (
        "Where in the noise: around the concept",
        "Left is the end of drawing (details), right its beginning (layout).",
    ),
    "timesteps_superclass": (
        "Where in the noise: plain noun",
        "Left is the end of drawing (details), right its beginning (layout).",
    ),
}


def plots(groups: Sequence[Group]) -> dict[str, str]:
    """SVG files by name, those of `PLOTS` for which something has been measured."""
    results = [result for group in groups for result in group.results]
    drawn, fidelity = {}, first_of(results, FIDELITY)
    for name, metrics in (("tradeoff_lfd", ["lfd_context"]), ("tradeoff_w2", DISTANCES)):
        if fidelity and (x := first_of(results, metrics)):
            drawn[name] = tradeoff(groups, x, fidelity)
    for kind, key, label in (("training", "step", "training step"), ("timesteps", "timestep", "timestep")):
        for prompts in (CONTEXT, *PLAIN):
            lines = [one for group in groups if (one := line(group, kind, prompts, key)).points]
            if f"{kind}_{prompts}" in PLOTS and lines:
                drawn[f"{kind}_{prompts}"] = curves(lines, label, "LFD")
    return drawn


def first_of(results: Sequence[Result], names: Sequence[str]) -> str | None:
    """The first metric that every result has."""
    return next((name for name in names if all(name in result["figures"] for result in results)), None)


def tradeoff(groups: Sequence[Group], x: str, y: str) -> str:
    """The plane of two metrics: groups, their runs, the base model, and the photos' likeness among themselves."""
    series = []
    for group in groups:
        runs = [(result["figures"][x]["value"], result["figures"][y]["value"]) for result in group.results]
        small = tuple(Point(*run) for run in runs) if len(runs) > 1 else ()
        series.append(Series(group.label, group.colour, (point(group.figures[x], group.figures[y]),), small))
    everything = figures_of([result for group in groups for result in group.results])
    if base := everything[y].get("base"):
        at = everything[x].get("floor", {"value": 0.0})["value"]
        series.append(Series("base model", GREY, (Point(at, base["value"]),)))
    ceiling = everything[y].get("ceiling")
    labels = {"lfd_context": "LFD around the concept", "w2_clip": "W2 of CLIP features", "w2_latent": "W2 of latents"}
    return plane(series, labels[x], METRICS[y].title, {METRICS[y].ceiling: ceiling["value"]} if ceiling else {})


def point(x: Figure, y: Figure) -> Point:
    return Point(x["value"], y["value"], x["stderr"] or 0.0, y["stderr"] or 0.0)


def line(group: Group, kind: str, prompts: str, key: str) -> Series:
    """A group's curve: at each place the common figure of the runs that have one there."""
    places: dict[float, list[tuple[str, Figure]]] = defaultdict(list)
    for result in group.results:
        for one in result[kind].get(prompts, ()):
            places[one[key]].append((concept_of(result), one))
    found = ((x, gather(places[x])) for x in sorted(places))
    points = tuple(Point(x, figure["value"], 0.0, figure["stderr"] or 0.0) for x, figure in found)
    return Series(group.label, group.colour, points)
