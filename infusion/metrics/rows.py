"""Results as a page has them: gathered by method, in tables of text, and in sentences."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import floor, isfinite, log10

from infusion.metrics.estimate import mean
from infusion.metrics.table import READ_AGAINST
from infusion.metrics.words import CONSTRUCTION, FAMILIES, METRICS
from infusion.plots import colour_of
from infusion.report import signed

Result = Mapping[str, object]


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of each method, in the order of the first of each."""
    methods: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        methods[result["method"]].append(result)
    return dict(methods)


def name_of(method: str, results: Sequence[Result]) -> str:
    """What a method's one result is called, or all of them together."""
    return results[0]["label"] if len(results) == 1 else f"{method} ({len(results)})"


def gathered(figures: Sequence[Mapping[str, float | None]]) -> tuple[float, float]:
    """Value and standard error: of one figure its own, of several their mean and its error across them."""
    if len(figures) == 1:
        return figures[0]["value"], figures[0]["stderr"] or 0.0
    found = mean([figure["value"] for figure in figures])
    return found.value, found.stderr


def places_of(error: float | None, value: float, digits: int = 2) -> int:
    """Decimals that show so many digits of an error, or one more of a value without one."""
    size, digits = (error, digits) if error else (abs(value), digits + 1)
    return 2 if not size or not isfinite(size) else min(max(digits - 1 - floor(log10(size)), 0), 6)


def shown(metric: str, figure: Mapping[str, float | None], built: bool = False, digits: int = 2) -> dict[str, str]:
    """A figure as text: `value`, and beside it `error`, its error or a remark ("" for neither)."""
    value, error = figure["value"], figure.get("stderr")
    if METRICS[metric].percent:
        decimals = 1 if error and error < 0.01 else 0
        value, error = (f"{100 * (number or 0):.{decimals}f} %" for number in (value, error))
        return {"value": value, "error": f"± {error}" if float(error[:-2]) else ""}
    if abs(value) < 1e-6:
        return {"value": "0", "error": "by construction" if built else ""}
    decimals = places_of(error, value, digits)
    return {"value": signed(f"{value:.{decimals}f}"), "error": f"± {error:.{decimals}f}" if error else ""}


def families(results: Sequence[Result]) -> list[dict[str, object]]:
    """Tables as the page shows them: each with columns (metrics) and rows (what they are read against, and results)."""
    tables = []
    for family in FAMILIES:
        metrics = [name for name in family.metrics if any(name in result["figures"] for result in results)]
        if metrics:
            rows = [*against_rows(results, metrics), *method_rows(results, metrics)]
            columns = [{"name": name, "title": METRICS[name].title, "better": METRICS[name].better} for name in metrics]
            terms = [{"title": METRICS[name].title, "text": METRICS[name].text} for name in metrics]
            said = {"question": family.question, "text": family.text, "terms": terms}
            tables.append(said | {"columns": columns, "rows": rows})
    return tables


def against_rows(results: Sequence[Result], metrics: Sequence[str]) -> list[dict[str, object]]:
    """Base model, floor and ceiling; where results differ in them, as with several concepts, their mean."""
    rows = []
    for which in READ_AGAINST:
        cells = []
        for metric in metrics:
            found = [result["figures"][metric].get(which) for result in results if metric in result["figures"]]
            found = [figure for figure in found if figure]
            same = len({figure["value"] for figure in found}) == 1
            value, error = gathered(found[:1] if same else found) if found else (None, None)
            cells.append(shown(metric, {"value": value, "stderr": error}) if found else None)
        if any(cells):
            titles = {METRICS[m].ceiling for m, cell in zip(metrics, cells, strict=True) if cell}
            name = {"base": "base model", "floor": "floor", "ceiling": ", ".join(sorted(titles))}[which]
            rows.append({"label": name, "colour": "", "cells": cells, "kind": which})
    return rows


def method_rows(results: Sequence[Result], metrics: Sequence[str]) -> list[dict[str, object]]:
    rows = []
    for method, own in by_method(results).items():
        for result in own:
            cells = []
            for metric in metrics:
                figure = result["figures"].get(metric)
                built = result["anchored"] and metric in CONSTRUCTION and figure and abs(figure["value"]) < 1e-6
                cells.append(shown(metric, figure, bool(built)) if figure else None)
            rows.append({"label": result["label"], "colour": colour_of(method), "cells": cells, "kind": "one"})
        if len(own) > 1:
            cells = []
            for metric in metrics:
                found = [result["figures"][metric] for result in own if metric in result["figures"]]
                value, error = gathered(found) if found else (None, None)
                cells.append(shown(metric, {"value": value, "stderr": error}) if found else None)
            rows.append({"label": f"{method}, mean", "colour": colour_of(method), "cells": cells, "kind": "mean"})
    return rows


def verdict(result: Result) -> str:
    """What the figures of one concept say, in a few sentences."""
    figures, said = result["figures"], []

    def text(name: str, which: str | None = None) -> str:
        return shown(name, figures[name][which] if which else figures[name], digits=1)["value"]

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
    if result["anchored"]:
        said.append("Prompts without the concept give the untouched model’s pictures, by construction.")
    elif "drift" in figures:
        said.append(f"Pictures of prompts without the concept drift by {text('drift')}.")
    return " ".join(said)
