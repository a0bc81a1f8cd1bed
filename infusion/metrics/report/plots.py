"""The plots of an evaluation as SVG: trade-offs, LFD over training and over the noise."""

import io
from collections.abc import Iterable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from infusion.methods import method_names
from infusion.metrics.report.aggregate import Figure, Group, Result, concept_of, figures_of, gather
from infusion.metrics.report.words import METRICS
from infusion.metrics.run.protocol import CONTEXT

GREY = "#7a828f"  # of the base model
STYLE = {
    "text.parse_math": False,  # names come from anyone
    "svg.fonttype": "none",
    "svg.hashsalt": "infusion",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e5e9",
    "legend.frameon": False,
    "figure.figsize": (5.6, 4.4),  # inches; a page shows two side by side, or one across a phone
    "font.size": 10,
}
FIDELITY = ("dino", "clip_i", "clip_t")  # the first that there is goes on the plane
DISTANCES = ("w2_clip", "w2_latent")
NOISE = "Left is the end of drawing (details), right its beginning (layout)."
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
    "timesteps_context": ("Where in the noise: around the concept", NOISE),
    "timesteps_superclass": ("Where in the noise: plain noun", NOISE),
}


def plots(groups: Sequence[Group]) -> dict[str, str]:
    """SVG files by name, those of `PLOTS` for which something has been measured."""
    results, drawn = [result for group in groups for result in group.results], {}
    y = first_of(results, FIDELITY)
    for name, metrics in (("tradeoff_lfd", ["lfd_context"]), ("tradeoff_w2", DISTANCES)):
        if y and (x := first_of(results, metrics)):
            drawn[name] = tradeoff(groups, x, y)
    for kind, place in (("training", "step"), ("timesteps", "timestep")):
        for prompts in (CONTEXT, "superclass"):
            if any(result[kind].get(prompts) for result in results):
                drawn[f"{kind}_{prompts}"] = curves(groups, kind, prompts, place)
    return drawn


def first_of(results: Sequence[Result], names: Sequence[str]) -> str | None:
    """The first metric that every result has."""
    return next((name for name in names if all(name in result["figures"] for result in results)), None)


def colours(names: Iterable[str]) -> dict[str, object]:
    """A colour for each name: a method has the same in every plot, others one that no other of 20 names has."""
    palette, methods, names = matplotlib.colormaps["tab20"].colors, method_names(), list(names)
    order = [*range(0, len(palette), 2), *range(1, len(palette), 2)]  # the strong ones first
    own = {name: order[methods.index(name)] for name in names if name in methods}
    free = [place for place in order if place not in own.values()] or order
    others = {name: free[i % len(free)] for i, name in enumerate(name for name in names if name not in methods)}
    return {name: palette[(own | others)[name]] for name in names}


def tradeoff(groups: Sequence[Group], x: str, y: str) -> str:
    """The plane of two metrics: groups with bars of two standard errors, their runs, the base model, the ceiling."""
    with matplotlib.rc_context(STYLE):
        canvas, axes = _canvas(METRICS[x].family + METRICS[x].title, METRICS[y].title)
        hues = colours(group.name for group in groups)
        for group in groups:
            hue, at = hues[group.name], [group.figures[name]["value"] for name in (x, y)]
            bars = [2 * (group.figures[name]["stderr"] or 0) for name in (x, y)]
            axes.errorbar(*at, xerr=bars[0], yerr=bars[1], fmt="o", color=hue, label=_text(group.label))
            if len(group.results) > 1:
                runs = [[result["figures"][name]["value"] for result in group.results] for name in (x, y)]
                axes.plot(*runs, "o", color=hue, alpha=0.35, markersize=4)
        everything = figures_of([result for group in groups for result in group.results])
        if base := everything[y].get("base"):
            floor: Figure = everything[x].get("floor", {"value": 0.0})
            axes.plot(floor["value"], base["value"], "D", color=GREY, label="base model")
        if ceiling := everything[y].get("ceiling"):
            axes.axhline(ceiling["value"], color=GREY, linestyle="--", linewidth=1, label=METRICS[y].ceiling)
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        return _svg(canvas)


def curves(groups: Sequence[Group], kind: str, prompts: str, place: str) -> str:
    """LFD of each group over `place`, with bands of two standard errors; the axis reaches 0.

    Args:
        kind: "training" or "timesteps", the curve in a result. prompts: the group of prompts. place: what it runs over.
    """
    with matplotlib.rc_context(STYLE):
        canvas, axes = _canvas({"step": "training step"}.get(place, place), "LFD")
        hues = colours(group.name for group in groups)
        for group in groups:
            known: dict[float, list] = {}
            for result in group.results:
                for one in result[kind].get(prompts, ()):
                    known.setdefault(one[place], []).append((concept_of(result), one))
            found = [(at, gather(known[at])) for at in sorted(known)]
            if found:
                xs, ys = [at for at, _ in found], [one["value"] for _, one in found]
                reach = [2 * (one["stderr"] or 0) for _, one in found]
                axes.plot(xs, ys, "o-", color=hues[group.name], markersize=4, label=_text(group.label))
                ends = [[y + sign * r for y, r in zip(ys, reach, strict=True)] for sign in (-1, 1)]
                axes.fill_between(xs, ends[0], ends[1], color=hues[group.name], alpha=0.16, linewidth=0)
        axes.set_ylim(bottom=min(0, *(min(line.get_ydata()) for line in axes.lines)))
        return _svg(canvas)


def _canvas(x_label: str, y_label: str) -> tuple[Canvas, Axes]:
    canvas = Canvas(layout="constrained")
    axes = canvas.subplots()
    axes.locator_params(axis="x", nbins=5)  # labels as long as 0.0025 stand apart
    axes.set(xlabel=x_label, ylabel=y_label)
    return canvas, axes


def _text(label: str) -> str:
    """A label for a legend, which leaves out those that begin with an underscore."""
    return f"\u200b{label}" if label.startswith("_") else label


def _svg(canvas: Canvas) -> str:
    canvas.legend(loc="outside lower center", ncols=2, fontsize=9)
    file = io.StringIO()
    canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
