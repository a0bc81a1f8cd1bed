"""The plots of an evaluation as SVG: trade-offs, and LFD over training."""

import io
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from infusion.metrics.report.aggregate import Group, concept_of, errors_over, figures_of, gather, likeness_of
from infusion.metrics.report.words import CHANGE, metric_of
from infusion.metrics.run.protocol import CONTEXT

GREY = "#7a828f"  # of the base model and of words
MARKERS = "osD^vP*Xph<>"
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
DISTANCES = ("w2_clip", "w2_latent")
PLOTS = {  # name -> heading and caption
    "tradeoff_lfd": ("Likeness against change around the concept", "Best is the upper left."),
    "tradeoff_w2": ("Likeness against distance from the untouched model’s samples", "Best is the upper left."),
    "training_context": (
        "Change around the concept while it was learned",
        "Stars: steps marked as the best.",
    ),
    "training_superclass": (
        "Change of the plain noun while it was learned",
        "Stars: steps marked as the best.",
    ),
}


def plots(groups: Sequence[Group]) -> dict[str, str]:
    """SVG files by name, those of `PLOTS` for which something has been measured."""
    results, drawn = [result for group in groups for result in group.results], {}
    y = likeness_of({name for result in results for name in result["figures"]})
    for name, metrics in (("tradeoff_lfd", [CHANGE]), ("tradeoff_w2", DISTANCES)):
        x = next((x for x in metrics if any({x, y} <= group.figures.keys() for group in groups)), None)
        if x:
            drawn[name] = tradeoff(groups, x, y)
    for prompts in (CONTEXT, "superclass"):
        if any(result["training"].get(prompts) for result in results):
            drawn[f"training_{prompts}"] = curves(groups, prompts)
    return drawn


def looks(groups: Sequence[Group]) -> dict[str, dict[str, object]]:
    """Colour and marker of each group, the same in every plot of a report; words are grey."""
    palette, found = matplotlib.colormaps["tab20"].colors, {}
    for i, group in enumerate(groups):
        place = (2 * i % 20 + i // 10) % 20  # the strong colours first
        found[group.name] = {"color": palette[place], "marker": MARKERS[i % len(MARKERS)]}
        if group.kind == "words":
            found[group.name]["color"] = GREY
    return found


def tradeoff(groups: Sequence[Group], x: str, y: str) -> str:
    """The plane of two metrics: groups with bars of one standard error; a line for what has no x."""
    with matplotlib.rc_context(STYLE):
        canvas, axes = _canvas(_axis(x), _axis(y))
        for group in groups:
            look, found = looks(groups)[group.name], [group.figures.get(name) for name in (x, y)]
            if all(found):
                (px, ex), (py, ey) = ((one["value"], one["stderr"] or 0) for one in found)
                style = {"markersize": 9 if group is groups[0] else 6, "capsize": 2, "linestyle": "none"}
                axes.errorbar(px, py, xerr=ex, yerr=ey, label=_text(group.label), **look, **style)
            elif found[1]:
                axes.axhline(found[1]["value"], color=look["color"], linestyle="--", label=_text(group.label))
        every = [result for group in groups for result in group.results]
        if base := figures_of(every, errors_over(every)).get(y, {}).get("base"):
            axes.axhline(base["value"], color=GREY, linestyle=":", label="base model")
        _log(axes.set_xscale, axes.xaxis, [group.figures[x]["value"] for group in groups if x in group.figures])
        return _svg(canvas)


def curves(groups: Sequence[Group], prompts: str) -> str:
    """LFD of each group while it was trained, with bands of one standard error.

    They run over the samples of the concept that were seen, or where some result does not know these, over steps.

    Args:
        prompts: the group of prompts.
    """
    results = [result for group in groups for result in group.results if result["training"].get(prompts)]
    seen, over = all(result.get("training_samples") for result in results), errors_over(results)
    with matplotlib.rc_context(STYLE):
        canvas, axes = _canvas("samples seen in training" if seen else "training step", "LFD, lower is better")
        heights = []
        for group in groups:
            known: dict[float, list] = {}
            bests, look = [], looks(groups)[group.name]
            for result in group.results:
                curve = result["training"].get(prompts, ())
                size = result["training_samples"] / result["training_steps"] if seen and curve else 1
                bests += [size * result["best_step"]] if curve and result.get("best_step") else []
                for one in curve:
                    known.setdefault(size * one["step"], []).append((concept_of(result), one))
            if known:
                xs = sorted(known)
                found = [gather(known[at], over) for at in xs]
                ys, reach = (np.array([one[key] or 0 for one in found]) for key in ("value", "stderr"))
                axes.plot(xs, ys, markersize=4, label=_text(group.label), **look)
                axes.fill_between(xs, ys - reach, ys + reach, color=look["color"], alpha=0.16, linewidth=0)
                axes.plot(bests, np.interp(bests, xs, ys), "*", color=look["color"], markersize=13)
                heights += ys.tolist()
        _log(axes.set_yscale, axes.yaxis, heights)
        return _svg(canvas)


def _log(scale: Callable[..., None], axis: Axis, values: Sequence[float]) -> None:
    """Make an axis logarithmic, linear near 0 where there are zeros: rivals stay apart beside one that is far off."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) < 2 * min(positive):
        return
    if len(positive) < len(values):
        scale("symlog", linthresh=min(positive) / 2)
        return
    scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _axis(name: str) -> str:
    metric = metric_of(name)
    return f"{metric.title}, {metric.better}" if metric.better else metric.title


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
    canvas.legend(loc="outside lower center", ncols=3, fontsize=9)
    file = io.StringIO()
    canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
