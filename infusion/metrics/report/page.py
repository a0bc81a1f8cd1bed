"""The report of an evaluation as one HTML page that needs nothing else: no network, no script, no file beside it."""

import base64
import io
from collections.abc import Mapping, Sequence
from datetime import datetime
from math import floor, isfinite, log10
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from infusion.metrics.report.aggregate import READ_AGAINST, Figure, Group, Result, concept_of, figures_of
from infusion.metrics.report.plots import PLOTS
from infusion.metrics.report.words import ARROWS, CONSTRUCTION, FAMILIES, METRICS
from infusion.sampling.pictures import SIDE, png, shrunk, to_image

TEMPLATES = Path(__file__).with_name("templates")
ZERO = 1e-6  # below, a figure is 0 but for rounding
EXACT = 64  # pixels at most of a picture that is a PNG, not a JPEG
PHOTOS, CARDS = 6, 8  # at most: photos of a concept; first and last samples each that a group shows
FEW, SHORT = 12, 6  # groups that have a verdict and open galleries; runs whose tables are open
RANKED = {  # what samples are ranked by -> headings of the first and the last, name of the score
    "clip_i": ("Most like the photos", "Least like the photos", "likeness "),
    "change": ("Changed least from the base model", "Changed most", "change "),
    "": ("Samples", "", ""),
}
Row = tuple[str, Mapping[str, Figure], bool]  # label, figures by metric, whether some are 0 by construction


def page(
    groups: Sequence[Group],
    drawn: Mapping[str, str],
    settings: Mapping[str, object],
    files: Mapping[str, str],
    command: str,
) -> str:
    """The report as HTML.

    Args:
        drawn: the plots, SVG by name.
        settings: of all results; its `protocols` are shown apart. files: SHA-256 by name. command: that measured.
    """
    results = [result for group in groups for result in group.results]
    listed = {key: ", ".join(map(str, v)) if isinstance(v, list) else v for key, v in settings.items()}
    protocols = listed.pop("protocols", {})
    pictures = {name: (*PLOTS[name], data_uri(svg.encode(), "svg+xml")) for name, svg in drawn.items()}
    shown = [present(group) for group in groups]
    for one in shown[1:]:
        one["photos"] = [] if one["photos"] == shown[0]["photos"] else one["photos"]
    return render(
        TEMPLATES / "metrics.html.j2",
        groups=shown,
        results=results,
        concepts=len({concept_of(result) for result in results}),
        few=FEW,
        short=SHORT,
        planes=[plot for name, plot in pictures.items() if name.startswith("tradeoff")],
        curves=[plot for name, plot in pictures.items() if not name.startswith("tradeoff")],
        families=families(groups),
        anchored=[group.label for group in groups if group.anchored],
        settings=listed,
        protocols=protocols,
        files={name: digest for name, digest in files.items() if digest}
        | {result["label"]: result["sha256"] for result in results},
        command=command,
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
    )


def render(template: Path, **values: object) -> str:
    """Fill in a template, which may extend those of this package; every value is escaped.

    Raises:
        jinja2.UndefinedError: the template wants a value that is not given.
    """
    loader = FileSystemLoader([template.parent, TEMPLATES])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "decimal": decimal}
    return environment.get_template(template.name).render(values)


# --- figures ----------------------------------------------------------------------------------------------------------


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
    if METRICS[metric].percent:
        places = 1 if error and error < 0.01 else 0
        return percent(value, places) + (f" ± {percent(error, places)}" if round(100 * (error or 0), places) else "")
    if abs(value) < ZERO:
        return "0 by construction" if built else "0"
    places = places_of(error, value)
    return decimal(value, places) + (f" ± {decimal(error, places)}" if error else "")


def table(rows: Sequence[Row], metrics: Sequence[str]) -> pd.DataFrame:
    """Figures as text: a line for each row, a column for each metric, "" where there is none."""
    frame = pd.DataFrame({
        METRICS[name].title + ARROWS[METRICS[name].better]: [
            text(name, figures[name], anchored and name in CONSTRUCTION) if name in figures else ""
            for _, figures, anchored in rows
        ]
        for name in metrics
    })  # fmt: skip
    return frame.set_axis([label for label, *_ in rows])


def against(figures: Mapping[str, Figure], metrics: Sequence[str]) -> list[Row]:
    """Rows of the base model, the floor and the ceiling."""
    rows = []
    for which in READ_AGAINST:
        known = {name: figures[name][which] for name in metrics if which in figures[name]}
        ceiling = ", ".join(sorted({METRICS[name].ceiling for name in known}))
        label = {"base": "base model", "floor": "floor", "ceiling": ceiling}[which]
        rows += [(label, known, False)] if known else []
    return rows


def families(groups: Sequence[Group]) -> list[dict[str, object]]:
    """The tables of the page, each with its question, the differences from the first group, and its terms."""
    results, tables = [result for group in groups for result in group.results], []
    everything = figures_of(results)
    for family in FAMILIES:
        metrics = [name for name in family.metrics if name in everything]
        if metrics:
            rows = [(titled(group), group.figures, group.anchored) for group in groups]
            runs = [(result["label"], result["figures"], result["anchored"]) for result in results]
            tables.append({
                "question": family.question,
                "text": family.text,
                "table": table(against(everything, metrics) + rows, metrics),
                "runs": table(runs, metrics) if len(runs) > len(groups) else None,
                "differences": differences(groups, metrics),
                "terms": {METRICS[name].title: METRICS[name].text for name in metrics},
            })  # fmt: skip
    return tables


def titled(group: Group) -> str:
    """Such as "lora (15 runs, 5 concepts)"."""
    runs, concepts = len(group.results), len(group.concepts)
    return f"{group.label} ({runs} runs, {concepts} concept{'s' * (concepts > 1)})" if runs > 1 else group.label


def differences(groups: Sequence[Group], metrics: Sequence[str]) -> dict[str, list[str]]:
    """Label -> how a group differs from the first beyond chance; only groups of which an interval is known."""
    said = {}
    for group in groups:
        found = {name: group.figures.get(name, {}).get("difference") for name in metrics}
        known = {name: figure for name, figure in found.items() if figure and figure["low"] is not None}
        if known:
            said[group.label] = [in_words(name, figure) for name, figure in known.items() if differs(figure)]
    return said


def differs(figure: Figure) -> bool:
    """Whether a difference is beyond chance, and more than rounding."""
    return abs(figure["value"]) >= ZERO and (figure["low"] > 0 or figure["high"] < 0)


def in_words(metric: str, figure: Figure) -> str:
    """A difference whose interval leaves 0 out: "drift: higher by 0.12 (0.05 to 0.19)"; shares in percentage points."""
    scale, unit = (100, " points") if METRICS[metric].percent else (1, "")
    low, value, high = sorted(abs(scale * figure[name]) for name in ("low", "value", "high"))
    places = places_of(scale * figure["stderr"], value)
    way = "higher" if figure["value"] > 0 else "lower"
    return f"{METRICS[metric].title}: {way} by {value:.{places}f}{unit} ({low:.{places}f} to {high:.{places}f})"


def verdict(group: Group) -> str:
    """What the figures of a group say, in a few sentences."""
    figures, said = group.figures, []
    for name, title in (("dino", "Likeness to the photos"), ("clip_t", "Agreement with the prompt")):
        name = "clip_i" if name == "dino" and name not in figures else name
        if name in figures:
            said.append(f"{title} goes from {text(name, figures[name]['base'])} to {text(name, figures[name])}.")
    if "lfd_context" in figures:
        said.append(f"Around the concept, predictions change by {text('lfd_context', figures['lfd_context'])}.")
    if group.anchored:
        said.append("Prompts without the concept give the untouched model’s pictures, by construction.")
    elif "drift" in figures:
        said.append(f"Pictures of prompts without the concept drift by {text('drift', figures['drift'])}.")
    return " ".join(said)


# --- pictures ---------------------------------------------------------------------------------------------------------


def present(group: Group) -> dict[str, object]:
    """One group as the page shows it."""
    ranked_by = group.results[0]["pictures"]["ranked_by"]
    *titles, word = RANKED[ranked_by]
    same = [result for result in group.results if result["pictures"]["ranked_by"] == ranked_by]
    falls = ranked_by == "clip_i"  # the first card has the largest score
    dealt = {titles[0]: deal(same, "best", falls), titles[1]: deal(same, "worst", not falls)}
    several = len(group.concepts) > 1
    photos = {concept_of(result): result["pictures"]["photos"] for result in group.results}
    return {
        "title": titled(group),
        "label": group.label,
        "about": about(group.results),
        "verdict": verdict(group),
        "several": several,
        "photos": [
            (picture(photo), Path(name).name.replace("_", " ") if several else "")
            for name, own in photos.items()
            if own is not None
            for photo in own[: 1 if several else PHOTOS]
        ],
        "galleries": {title: [card(run, one, word) for run, one in ones] for title, ones in dealt.items() if ones},
    }


def about(results: Sequence[Result]) -> str:
    """How runs were trained, in half a sentence."""

    def each(key: str, form: str = "") -> str:
        return " or ".join(dict.fromkeys(format(result[key], form) for result in results))

    said = f"{each('method')}, of “{each('superclass')}”"
    said += f", written “{each('noun')}” in its prompts" if each("noun") != each("superclass") else ""
    trained = f"{each('training_steps')} steps at learning rate {each('learning_rate', 'g')}"
    return f"{said}; {each('numbers', ',')} parameters, {trained}"


def deal(results: Sequence[Result], which: str, falls: bool) -> list[tuple[str, Mapping[str, object]]]:
    """The first of the runs' `best` or `worst` cards, each with the name of its run; `falls`: largest scores first.

    Each concept gives its first before any gives its second: a concept that is unlike its photos in every picture
    would else be all that is seen of the worst.
    """
    rows = [
        (concept_of(result), one["score"] or 0.0, result["label"], one)
        for result in results
        for one in result["pictures"][which]
    ]
    cards = pd.DataFrame(rows, columns=["concept", "score", "run", "card"])
    cards = cards.sort_values("score", ascending=not falls, kind="stable")
    cards["turn"] = cards.groupby("concept").cumcount()
    cards = cards.sort_values("turn", kind="stable").head(CARDS)
    return list(zip(cards["run"], cards["card"], strict=True))


def card(run: str, one: Mapping[str, object], word: str) -> dict[str, object]:
    score = "" if one["score"] is None else word + decimal(one["score"])
    pictures = {"base": picture(one["base"]), "ours": picture(one["ours"])}
    return {"run": run, "prompt": one["prompt"], "seed": one["seed"], "score": score} | pictures


def picture(image: Tensor, side: int = SIDE) -> str:
    """An image (3, H, W) in [0, 1] as part of a page, its longer side at most `side` pixels."""
    image = shrunk(image[None], side)[0]
    if max(image.shape[1:]) <= EXACT:
        return data_uri(png(image))
    file = io.BytesIO()
    to_image(image).save(file, "JPEG", quality=85, optimize=True)
    return data_uri(file.getvalue(), "jpeg")


def data_uri(content: bytes, kind: str = "png") -> str:
    """An image file as an address that holds the picture itself."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
