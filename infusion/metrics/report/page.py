"""The report of an evaluation as one page, from results and plots alone."""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from markupsafe import Markup
from torch import Tensor

from infusion.metrics.report.aggregate import Group, Result, concept_of
from infusion.metrics.report.charts import PLOTS
from infusion.metrics.report.html import data_uri, decimal, render
from infusion.metrics.report.plots import inline
from infusion.metrics.report.rows import counted, families, size_of, verdict
from infusion.metrics.report.table import CSV, JSON, Measured
from infusion.sampling.pictures import SIDE, png, shrunk, to_image

PROMPTS = {  # a protocol's key -> heading
    "concept": "with the concept",
    "none": "that name nothing of the kind",
    "superclass": "with the plain noun",
    "neighbours": "with neighbouring nouns",
    "nouns": "neighbouring nouns that were chosen",
}
RANKED = {  # what samples are ranked by -> headings of the first and the last, name of the score, whether it falls
    "clip_i": ("Most like the photos", "Least like the photos", "likeness", True),
    "change": ("Changed least from the base model", "Changed most", "change", False),
    "": ("Samples", "", "", False),
}
SMALL, EXACT = 128, 64  # pixels at most of a photo among those of many; of a PNG, not a JPEG
PHOTOS = 6  # at most of a concept alone
CARDS = 8  # first and last samples each that a group shows
FEW, SHORT = 12, 6  # groups that have a verdict and open galleries; runs whose tables are open


def page(measured: Measured, drawn: Mapping[str, str]) -> str:
    """The report as HTML."""
    results, groups, settings = measured.results, measured.groups, dict(measured.settings)
    protocols, many = settings.pop("protocols", {}), len(groups) < len(results)
    return render(
        "metrics.html.j2",
        results=results,
        groups=present(groups),
        things=counted(len({concept_of(result) for result in results}), "particular thing"),
        ways=counted(len(groups), "way"),
        many=many,
        few=FEW,
        short=SHORT,
        plots=[
            # matplotlib escapes what it writes
            {"name": name, "svg": Markup(inline(svg)), "title": PLOTS[name][0], "caption": PLOTS[name][1]}  # noqa: S704
            for name, svg in drawn.items()
        ],  # fmt: skip
        families=families(groups),
        pres=any("pres" in result["figures"] for result in results),
        anchored=[group.label for group in groups if group.anchored],
        settings={name: ", ".join(map(str, v)) if isinstance(v, list) else v for name, v in settings.items()},
        protocols={
            name: {title: prompts[key] for key, title in PROMPTS.items() if prompts.get(key)}
            for name, prompts in protocols.items()
        },
        files=measured.files,
        command=measured.command,
        json=JSON,
        csv=CSV,
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
    )


def present(groups: Sequence[Group]) -> list[dict[str, object]]:
    """Groups as the page shows them; photos of one concept that several groups share are shown with the first."""
    rows, before = [present_one(group) for group in groups], []
    for row in rows:
        if not row["several"] and row["photos"] in before:
            row["photos"] = []
        before.append(row["photos"])
    return rows


def present_one(group: Group) -> dict[str, object]:
    """One group as the page shows it."""
    ranked_by = group.results[0]["pictures"]["ranked_by"]
    *titles, word, falls = RANKED[ranked_by]
    same = [result for result in group.results if result["pictures"]["ranked_by"] == ranked_by]
    dealt = [deal(same, "best", falls), deal(same, "worst", not falls)]
    cards = [[card(*one, word) for one in ones] for ones in dealt]
    return {
        "label": group.label,
        "colour": group.colour,
        "size": size_of(group),
        "methods": each(group.results, "method"),
        "several": len(group.concepts) > 1,
        "about": about(group.results),
        "verdict": verdict(group),
        "photos": photos_of(group),
        "galleries": [(title, ones) for title, ones in zip(titles, cards, strict=True) if ones],
    }


def about(results: Sequence[Result]) -> str:
    """How runs were trained, in half a sentence."""
    nouns = {(result["superclass"], result["noun"]) for result in results}
    superclass, noun = next(iter(nouns))
    said = each(results, "method") + (f", of “{superclass}”" if len(nouns) == 1 else "")
    said += f", written “{noun}” in its prompts" if len(nouns) == 1 and noun != superclass else ""
    trained = f"{each(results, 'training_steps')} steps at learning rate {each(results, 'learning_rate', 'g')}"
    return f"{said}; {each(results, 'numbers', ',')} numbers, {trained}"


def each(results: Sequence[Result], key: str, form: str = "") -> str:
    """All that there is of something in results: "300 or 400"."""
    return " or ".join(dict.fromkeys(format(result[key], form) for result in results))


def photos_of(group: Group) -> list[dict[str, str]]:
    """The first photos of a group's one concept, or one of each concept with its name."""
    several = len(group.concepts) > 1
    count, side = (1, SMALL) if several else (PHOTOS, SIDE)
    known = {concept_of(result): result["pictures"]["photos"] for result in group.results}
    return [
        {"picture": picture(photo, side), "name": Path(name).name.replace("_", " ") if several else ""}
        for name, photos in known.items()
        if photos is not None
        for photo in photos[:count]
    ]


def deal(results: Sequence[Result], which: str, falls: bool) -> list[tuple[str, Mapping[str, object]]]:
    """The first of the runs' `best` or `worst` cards, each with the name of its run.

    Each concept gives its first before any gives its second: a concept that is unlike its photos in every picture
    would else be all that is seen of the worst. `falls` says that the first card has the largest score.
    """
    concepts: dict[str, list] = defaultdict(list)
    for result in results:
        concepts[concept_of(result)] += [(result["label"], one) for one in result["pictures"][which]]

    def order(one: tuple[str, Mapping[str, object]]) -> float:
        return (one[1]["score"] or 0.0) * (-1 if falls else 1)

    ranked = [pair for own in concepts.values() for pair in enumerate(sorted(own, key=order))]
    return [one for _, one in sorted(ranked, key=lambda pair: (pair[0], order(pair[1])))[:CARDS]]


def card(run: str, one: Mapping[str, object], word: str) -> dict[str, str]:
    score = "" if one["score"] is None else f"{word} {decimal(one['score'])}"
    said = {"run": run, "short": run.replace("_", "_\u200b"), "prompt": one["prompt"], "seed": one["seed"]}
    return said | {"score": score, "base": picture(one["base"]), "ours": picture(one["ours"])}


def picture(image: Tensor, side: int = SIDE) -> str:
    """An image (3, H, W) in [0, 1] as part of a page, its longer side at most `side` pixels."""
    image = shrunk(image[None], side)[0]
    if max(image.shape[1:]) <= EXACT:
        return data_uri(png(image))
    file = io.BytesIO()
    to_image(image).save(file, "JPEG", quality=85, optimize=True)
    return data_uri(file.getvalue(), "jpeg")
