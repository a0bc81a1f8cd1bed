"""Figures as text: the tables of the page and of Markdown, and the message in words."""

from collections.abc import Sequence
from math import floor, isfinite, log10

import pandas as pd

from infusion.metrics.report.aggregate import (
    CONCEPTS,
    Figure,
    Group,
    beyond,
    errors_over,
    figures_of,
    likeness_of,
)
from infusion.metrics.report.words import CHANGE, CONSTRUCTION, FAMILIES, HIGHER, KEPT, METRICS, READ_AGAINST, metric_of

ZERO = 1e-6  # below, a figure is 0 but for rounding
TOLERANCE = 0.05  # a share that falls by no more than this is kept
PRIMARY, EXPLORATORY = "*", "°"  # marks of differences from the first group beyond chance


def decimal(value: float, places: int = 2) -> str:
    """0.254 -> "0.25", with a typographic minus, and with none where it has been rounded to zero."""
    return f"{round(value, places) + 0.0:.{places}f}".replace("-", "−")


def percent(value: float, places: int = 0) -> str:
    """0.25 -> "25 %"."""
    return f"{decimal(100 * value, places)} %"


def places_of(error: float | None, value: float) -> int:
    """Decimals that show two digits of an error, or three of a value without one."""
    size, digits = (error, 2) if error else (abs(value), 3)
    return 2 if not size or not isfinite(size) else min(max(digits - 1 - floor(log10(size)), 0), 6)


def text(metric: str, figure: Figure, built: bool = False) -> str:
    """A figure for a table, such as "0.123 ± 0.012"; `built` says that a 0 is one by construction."""
    value, error = figure["value"], figure.get("stderr")
    if metric_of(metric).percent:
        places = 1 if error and error < 0.01 else 0
        return percent(value, places) + (f" ± {percent(error, places)}" if round(100 * (error or 0), places) else "")
    if abs(value) < ZERO:
        return "0 by construction" if built else "0"
    places = places_of(error, value)
    return decimal(value, places) + (f" ± {decimal(error, places)}" if error else "")


def cell(group: Group, metric: str) -> str:
    """A group's figure with the mark of its difference, and for an LFD its floor: the untrained method's own figure."""
    if (figure := group.figures.get(metric)) is None:
        return ""
    found = figure.get("difference")
    said = text(metric, figure, group.anchored and metric in CONSTRUCTION)
    said += (PRIMARY if found["primary"] else EXPLORATORY) if beyond(found) else ""
    if not (has_own_floor(metric) and "floor" in figure):
        return said
    floor = figure["floor"]["value"]
    return f"{said} (floor {decimal(floor, places_of(figure['stderr'], figure['value'])) if floor > ZERO else 0})"


def has_own_floor(metric: str) -> bool:
    """Whether the floor is the method's own; that of a distance is the base model's, one for all."""
    return metric.startswith("lfd")


def table(groups: Sequence[Group], metrics: Sequence[str]) -> pd.DataFrame:
    """Figures as text: rows for what they are read against and for each group; "" where there is none."""
    results = [result for group in groups for result in group.results]
    over, endpoints = errors_over(results), primary(groups)
    everything, rows = figures_of(results, over), {}
    for which, title in READ_AGAINST.items():
        known = [name for name in metrics if which in everything.get(name, {})]
        known = [name for name in known if which != "floor" or not has_own_floor(name)]
        if known:
            rows[title] = [text(name, everything[name][which]) if name in known else "" for name in metrics]
    index = pd.Index([*rows, *map(titled, groups)], name=f"± {over}")
    heads = [metric_of(name).head + (" [primary]" if name in endpoints else "") for name in metrics]
    ours = ([cell(group, name) for name in metrics] for group in groups)
    return pd.DataFrame([*rows.values(), *ours], index, heads, dtype=object)


def primary(groups: Sequence[Group]) -> list[str]:
    """The primary endpoints that were measured."""
    return [name for name in (likeness_of(groups[0].figures), CHANGE) if name in groups[0].figures] if groups else []


def notes(groups: Sequence[Group]) -> str:
    """What ± and the marks of a table mean."""
    results = [result for group in groups for result in group.results]
    tests = sum("p_holm" in one.get("difference", {}) for group in groups for one in group.figures.values())
    said = f"± is one standard error {errors_over(results)}; none where nothing varies."
    if errors_over(results) != CONCEPTS:
        return f"{said} With one concept, nothing is said about others, and no difference is tested."
    return (
        f"{said} {PRIMARY} differs from {titled(groups[0])} on a primary endpoint: 5 % by Holm over all {tests} "
        f"comparisons. {EXPLORATORY} exploratory: 5 % without a correction; of twenty, one is expected by chance."
    )


def titled(group: Group) -> str:
    """The label as a reader has it."""
    return group.label.replace("_", " ")


def headline(groups: Sequence[Group]) -> pd.DataFrame:
    """The table of the primary endpoints, with each group's difference from the first and its p-value by Holm."""
    frame = table(groups, primary(groups))
    first, beside = titled(groups[0]), len(frame) - len(groups)
    for at, name in reversed(list(enumerate(primary(groups), 1))):
        found = [group.figures.get(name, {}).get("difference") for group in groups]
        if any(found):
            frame.insert(at, f"from {first} (Holm){' ' * at}", [""] * beside + [step(name, one) for one in found])
    return frame


def step(metric: str, found: Figure | None) -> str:
    """A difference and its corrected p-value: "−0.100, p 0.31" or "× 2.3, p 0.02"."""
    if not found:
        return ""
    if found["scale"] == "ratio":
        said = f"× {decimal(found['value'], 1 if found['value'] >= 2 else 2)}"
    elif metric_of(metric).percent:
        said = percent(found["value"]).replace("%", "points")
    else:
        said = decimal(found["value"], 2)
    p = found.get("p_holm", found["p"])
    return said if p is None else f"{said}, p {'< 0.001' if p < 0.001 else format(p, '.1g' if p < 0.1 else '.2f')}"


def message(groups: Sequence[Group]) -> dict[str, str]:
    """What the figures say, by plain rules: sentences by what they are about.

    A share is kept that falls by at most `TOLERANCE` below the base model's. One method differs from another where the
    test says so (`beyond`). A method beats its words where the 95 % interval of the difference lies above 0. Of epochs,
    the one to keep comes first.
    """
    ours, likeness = next((group for group in groups if group.keep), groups[0]), likeness_of(groups[0].figures)
    name, said = titled(ours), {}
    if likeness:
        figure = ours.figures[likeness]
        against = {"base": "untouched model", "ceiling": "photos", "ceiling_decoded": "ceiling"}
        known = {title: decimal(figure[which]["value"]) for which, title in against.items() if which in figure}
        beside = ", ".join(f"{title} {value}" for title, value in known.items())
        said["Concept"] = f"{name} reaches a likeness of {decimal(figure['value'])}{f' ({beside})' * bool(beside)}."
    said["Rest of prompt"] = kept(ours)
    if likeness and any(group.kind == "words" for group in groups):
        said["Words"] = beside_words(groups, likeness)
    for title, metric in (("Likeness", likeness), ("Surroundings", CHANGE)):
        if metric in ours.figures and len(groups) > 1:
            said[title] = beside_others(groups, metric)
    return {title: sentence for title, sentence in said.items() if sentence}


def kept(group: Group) -> str:
    """Which shares are about the base model's, and which are not; what becomes of prompts without the concept."""
    keeps, loses = [], []
    for metric in KEPT:
        figure = group.figures.get(metric, {})
        if "base" in figure:
            value, base = figure["value"], figure["base"]["value"]
            title = metric_of(metric).title.removesuffix(" as prompted").removesuffix(" kept")
            if value >= base - TOLERANCE:
                keeps.append(f"the {title} ({percent(value)})")
            else:
                loses.append(f"the {title} ({percent(value)}, untouched {percent(base)})")
    said = [f"{verb} {listed(ones)}" for verb, ones in (("keeps", keeps), ("loses some of", loses)) if ones]
    sentences = [f"{titled(group)} {' and '.join(said)}."] if said else []
    if group.anchored:
        sentences.append("Prompts without the concept are untouched by construction.")
    elif "drift" in group.figures:
        sentences.append(f"Prompts without the concept drift by {text('drift', group.figures['drift'])}.")
    return " ".join(sentences)


def beside_words(groups: Sequence[Group], likeness: str) -> str:
    """How like the photos words alone come, and which methods are not shown to do better."""
    figures = [group.figures[likeness] for group in groups if group.kind == "words" and likeness in group.figures]
    found = {titled(group): group.figures.get(likeness, {}).get("words") for group in groups if group.kind == "concept"}
    tested = {name: one for name, one in found.items() if one and one["low"] is not None}
    beats = [name for name, one in tested.items() if one["low"] > 0]
    fails = [name for name in tested if name not in beats]
    said = [f"Words alone reach {decimal(figure['value'])}." for figure in figures[:1]]
    said += [f"Better than its words: {listed(beats)}."] if beats else []
    said += [f"Does not beat its words: {listed(fails)}."] if fails else []
    return " ".join(said)


def beside_others(groups: Sequence[Group], metric: str) -> str:
    """Which groups differ from the first on a primary endpoint."""
    better, worse, same = [], [], []
    for group in groups[1:]:
        found = group.figures.get(metric, {}).get("difference")
        if group.kind != "words" and found and found["p"] is not None:
            up = found["value"] > (1 if found["scale"] == "ratio" else 0)
            target = (better if up == (metric_of(metric).better == HIGHER) else worse) if beyond(found) else same
            target.append(titled(group) + (f" ({step(metric, found)})" if target is not same else ""))
    words = {f"better than {titled(groups[0])}": better, "worse": worse, "no difference shown": same}
    said = "; ".join(f"{title}: {listed(ones)}" for title, ones in words.items() if ones)
    return f"{said[0].upper()}{said[1:]}." if said else ""


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def markdown(frame: pd.DataFrame) -> str:
    """A frame of text as a Markdown table."""
    lines = [[frame.index.name or "", *frame.columns], ["---"] * (len(frame.columns) + 1)]
    lines += [[str(label), *cells] for label, *cells in frame.itertuples()]
    return "\n".join(f"| {' | '.join(cell.strip() for cell in line)} |" for line in lines)


def families(groups: Sequence[Group]) -> list[tuple[str, str, pd.DataFrame]]:
    """Heading, text and table of each family of metrics; what no family knows comes last."""
    measured = list(dict.fromkeys(name for group in groups for name in group.figures))
    others = [name for name in measured if name not in METRICS]
    wanted = [*((title, said, [*metrics]) for title, (said, metrics) in FAMILIES.items()), ("Others", "", others)]
    wanted = [(title, said, [name for name in names if name in measured]) for title, said, names in wanted]
    return [(title, said, table(groups, names)) for title, said, names in wanted if names]
