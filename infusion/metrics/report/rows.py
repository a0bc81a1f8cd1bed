"""Figures as a page has them: in tables of text, and in sentences."""

from collections.abc import Mapping, Sequence
from math import floor, isfinite, log10

from infusion.metrics.report.aggregate import READ_AGAINST, Figure, Group, figures_of
from infusion.metrics.report.html import signed
from infusion.metrics.report.words import CONSTRUCTION, FAMILIES, METRICS

ZERO = 1e-6  # below, a figure is 0 but for rounding


def places_of(error: float | None, value: float, digits: int = 2) -> int:
    """Decimals that show so many digits of an error, or one more of a value without one."""
    size, digits = (error, digits) if error else (abs(value), digits + 1)
    return 2 if not size or not isfinite(size) else min(max(digits - 1 - floor(log10(size)), 0), 6)


def shown(metric: str, figure: Figure, built: bool = False, digits: int = 2) -> dict[str, str]:
    """A figure as text: `value`, and beside it `error`, its error or a remark ("" for neither)."""
    value, error = figure["value"], figure.get("stderr")
    if METRICS[metric].percent:
        decimals = 1 if error and error < 0.01 else 0
        value, error = (f"{100 * (number or 0):.{decimals}f} %" for number in (value, error))
        return {"value": value, "error": f"± {error}" if float(error[:-2]) else ""}
    if abs(value) < ZERO:
        return {"value": "0", "error": "by construction" if built else ""}
    decimals = places_of(error, value, digits)
    return {"value": signed(f"{value:.{decimals}f}"), "error": f"± {error:.{decimals}f}" if error else ""}


def briefly(metric: str, figure: Figure) -> str:
    """A figure's value for a sentence: to two digits of its own, or to one of its error where that is fewer."""
    value, error = figure["value"], figure["stderr"]
    places = min(places_of(error, value, 1), max(places_of(None, value, 1), 2))
    return signed(f"{value:.{places}f}")


def families(groups: Sequence[Group]) -> list[dict[str, object]]:
    """Tables as the page shows them, each of the metrics of a family that there are.

    Returns:
        Of each `question`, `text`, `terms`; `columns`; `rows`, what the metrics are read against, and the groups;
        `runs`, rows of all runs, none where no group has more than one; and `differences`, see there.
    """
    everything, tables = figures_of([result for group in groups for result in group.results]), []
    for family in FAMILIES:
        metrics = [name for name in family.metrics if name in everything]
        if metrics:
            columns = [{"title": METRICS[name].title, "better": METRICS[name].better} for name in metrics]
            terms = [{"title": METRICS[name].title, "text": METRICS[name].text} for name in metrics]
            table = {"question": family.question, "text": family.text, "terms": terms, "columns": columns}
            table |= {"rows": [*against_rows(everything, metrics), *group_rows(groups, metrics)]}
            tables.append(table | {"runs": run_rows(groups, metrics), "differences": differences(groups, metrics)})
    return tables


def against_rows(figures: Mapping[str, Figure], metrics: Sequence[str]) -> list[dict[str, object]]:
    """Base model, floor and ceiling, of all results together."""
    rows = []
    for which in READ_AGAINST:
        known = {metric: figures[metric][which] for metric in metrics if which in figures[metric]}
        titles = ", ".join(sorted({METRICS[metric].ceiling for metric in known}))
        label = {"base": "base model", "floor": "floor", "ceiling": titles}[which]
        rows += [row("against", label, known, metrics)] if known else []
    return rows


def group_rows(groups: Sequence[Group], metrics: Sequence[str]) -> list[dict[str, object]]:
    return [row("group", one.label, one.figures, metrics, one.colour, size_of(one), one.anchored) for one in groups]


def run_rows(groups: Sequence[Group], metrics: Sequence[str]) -> list[dict[str, object]]:
    if all(len(group.results) == 1 for group in groups):
        return []
    runs = [(group, result) for group in groups for result in group.results]
    return [
        row("run", result["label"], result["figures"], metrics, group.colour, anchored=result["anchored"])
        for group, result in runs
    ]


def row(
    kind: str,
    label: str,
    figures: Mapping[str, Figure],
    metrics: Sequence[str],
    colour: str = "",
    note: str = "",
    anchored: bool = False,
) -> dict[str, object]:
    """A row of a table: a cell for each of the metrics, None for those that are not known."""
    cells = [
        shown(name, figures[name], anchored and name in CONSTRUCTION) if name in figures else None for name in metrics
    ]
    return {"kind": kind, "label": label, "note": note, "colour": colour, "cells": cells}


def size_of(group: Group) -> str:
    """Such as "15 runs, 5 concepts"; "" for one run."""
    return f"{len(group.results)} runs, {counted(len(group.concepts), 'concept')}" if len(group.results) > 1 else ""


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def differences(groups: Sequence[Group], metrics: Sequence[str]) -> list[dict[str, object]]:
    """How each group differs from the first; groups for which no interval is known are left out.

    Returns:
        Of each `label`, `colour` and `beyond`: what there is to say of the metrics whose interval leaves 0 out.
    """
    said = []
    for group in groups:
        found = {name: group.figures.get(name, {}).get("difference") for name in metrics}
        known = {name: figure for name, figure in found.items() if figure and figure["low"] is not None}
        if known:
            beyond = [in_words(name, figure) for name, figure in known.items() if differs(figure)]
            said.append({"label": group.label, "colour": group.colour, "beyond": beyond})
    return said


def differs(figure: Figure) -> bool:
    """Whether a difference is beyond chance, and more than rounding."""
    return abs(figure["value"]) >= ZERO and (figure["low"] > 0 or figure["high"] < 0)


def in_words(metric: str, figure: Figure) -> str:
    """A difference whose interval leaves 0 out: "drift: higher by 0.12 (0.05 to 0.19)"; shares in percentage points."""
    scale, unit = (100, " points") if METRICS[metric].percent else (1, "")
    low, value, high = sorted(abs(scale * figure[name]) for name in ("low", "value", "high"))
    decimals = places_of(scale * figure["stderr"], value)
    way = "higher" if figure["value"] > 0 else "lower"
    return f"{METRICS[metric].title}: {way} by {value:.{decimals}f}{unit} ({low:.{decimals}f} to {high:.{decimals}f})"


def verdict(group: Group) -> str:
    """What the figures of a group say, in a few sentences."""
    figures, said = group.figures, []

    def text(name: str, which: str | None = None) -> str:
        return briefly(name, figures[name][which] if which else figures[name])

    fidelity = next((name for name in ("dino", "clip_i") if name in figures), None)
    if fidelity:
        said.append(
            f"Likeness to the photos goes from {text(fidelity, 'base')} to {text(fidelity)} "
            f"(the photos among themselves: {text(fidelity, 'ceiling')})."
        )
    if "clip_t" in figures:
        said.append(f"Agreement with the prompt goes from {text('clip_t', 'base')} to {text('clip_t')}.")
    if "lfd_context" in figures:
        said.append(f"Around the concept, predictions change by {text('lfd_context')}.")
    if group.anchored:
        said.append("Prompts without the concept give the untouched model’s pictures, by construction.")
    elif "drift" in figures:
        said.append(f"Pictures of prompts without the concept drift by {text('drift')}.")
    return " ".join(said)
