"""The plots of an evaluation: trade-offs, LFD over training and over the noise."""

from collections import defaultdict
from collections.abc import Sequence

from infusion.metrics.protocol import CONTEXT, PLAIN
from infusion.metrics.rows import Result, by_method, gathered, name_of
from infusion.metrics.words import METRICS
from infusion.plots import Point, Series, colour_of, curves, plane

FIDELITY = ("dino", "clip_i", "clip_t")  # the first that there is goes on the plane
DISTANCES = ("w2_clip", "w2_latent")
BASE_COLOUR = "#7a828f"
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


def first_of(results: Sequence[Result], names: Sequence[str]) -> str | None:
    """The first metric that every result has."""
    return next((name for name in names if all(name in result["figures"] for result in results)), None)


def plots(results: Sequence[Result]) -> dict[str, str]:
    """SVG files by name, those of `PLOTS` for which something has been measured."""
    drawn, fidelity = {}, first_of(results, FIDELITY)
    for name, metrics in (("tradeoff_lfd", ["lfd_context"]), ("tradeoff_w2", DISTANCES)):
        if fidelity and (x := first_of(results, metrics)):
            drawn[name] = tradeoff(results, x, fidelity)
    for kind, key, label in (("training", "step", "training step"), ("timesteps", "timestep", "timestep")):
        for group in (CONTEXT, *PLAIN):
            having = [result for result in results if result[kind].get(group)]
            if f"{kind}_{group}" in PLOTS and having:
                lines = [line(m, own, kind, group, key) for m, own in by_method(having).items()]
                drawn[f"{kind}_{group}"] = curves(lines, label, "LFD")
    return drawn


def tradeoff(results: Sequence[Result], x: str, y: str) -> str:
    """The plane of two metrics, with the base model, and the photos' likeness among themselves as a line."""
    series = []
    for method, own in by_method(results).items():
        pairs = [(result["figures"][x], result["figures"][y]) for result in own]
        (x_value, x_error), (y_value, y_error) = (gathered(column) for column in zip(*pairs, strict=True))
        small = tuple(Point(a["value"], b["value"]) for a, b in pairs) if len(own) > 1 else ()
        point = Point(x_value, y_value, x_error, y_error)
        series.append(Series(name_of(method, own), colour_of(method), (point,), small))
    against = {name: [result["figures"][y][name]["value"] for result in results if name in result["figures"][y]]
               for name in ("base", "ceiling")}  # fmt: skip
    if against["base"]:
        at = [result["figures"][x].get("floor", {"value": 0.0})["value"] for result in results]
        series.append(Series("base model", BASE_COLOUR, (Point(average(at), average(against["base"])),)))
    lines = {METRICS[y].ceiling: average(against["ceiling"])} if against["ceiling"] else {}
    labels = {"lfd_context": "LFD around the concept", "w2_clip": "W2 of CLIP features", "w2_latent": "W2 of latents"}
    return plane(series, labels[x], METRICS[y].title, lines)


def line(method: str, results: Sequence[Result], kind: str, group: str, key: str) -> Series:
    """A curve of one method: of one result its own, of several the mean at each place that they have."""
    places: dict[float, list] = defaultdict(list)
    for result in results:
        for one in result[kind][group]:
            places[one[key]].append(one)
    points = tuple(Point(x, value, 0.0, error) for x, (value, error) in
                   ((x, gathered(ones)) for x, ones in sorted(places.items())))  # fmt: skip
    return Series(name_of(method, results), colour_of(method), points)


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
