"""The report of an evaluation as one page, from results and plots alone."""

from collections.abc import Mapping, Sequence
from datetime import datetime

import torch
import torch.nn.functional as F
from markupsafe import Markup
from torch import Tensor

from infusion.metrics.charts import PLOTS
from infusion.metrics.rows import Result, by_method, families, verdict
from infusion.metrics.table import CSV, JSON, Measured
from infusion.pictures import png
from infusion.plots import colour_of, inline
from infusion.report import data_uri, decimal, render

PROMPTS = {  # a protocol's key -> heading
    "concept": "with the concept",
    "none": "that name nothing of the kind",
    "superclass": "with the plain noun",
    "neighbours": "with neighbouring nouns",
    "nouns": "neighbouring nouns that were chosen",
}
SIDE, PHOTOS = 256, 6  # pixels of a picture at most; photos at most


def page(measured: Measured, drawn: Mapping[str, str]) -> str:
    """The report as HTML."""
    results, settings = measured.results, dict(measured.settings)
    prompts = settings.pop("protocol", {})
    return render(
        "metrics.html.j2",
        results=present(results),
        many=len(by_method(results)) < len(results),
        plots=[
            {"name": name, "svg": Markup(inline(svg)), "title": PLOTS[name][0], "caption": PLOTS[name][1]}
            for name, svg in drawn.items()
        ],  # fmt: skip
        families=families(results),
        anchored=[result["label"] for result in results if result["anchored"]],
        settings={name: ", ".join(map(str, v)) if isinstance(v, list) else v for name, v in settings.items()},
        prompts={title: prompts[name] for name, title in PROMPTS.items() if prompts.get(name)},
        files=measured.files,
        command=measured.command,
        json=JSON,
        csv=CSV,
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
    )


def present(results: Sequence[Result]) -> list[dict[str, object]]:
    """Results as the page shows them; photos that several share are shown with the first."""
    shown_before: list[list[str]] = []
    rows = [present_one(result) for result in results]
    for row in rows:
        if row["photos"] in shown_before:
            row["photos"] = []
        shown_before.append(row["photos"])
    return rows


def present_one(result: Result) -> dict[str, object]:
    """One result as the page shows it."""
    pictures = result["pictures"]
    photos = pictures["photos"]
    *titles, word = {
        "clip_i": ("Most like the photos", "Least like the photos", "likeness"),
        "change": ("Changed least from the base model", "Changed most", "change"),
        "": ("Samples", "", ""),
    }[pictures["ranked_by"]]
    cards = [[card(one, word) for one in pictures[which]] for which in ("best", "worst")]
    return {
        **{key: value for key, value in result.items() if key != "pictures"},
        "colour": colour_of(result["method"]),
        "short": result["label"].replace("_", "_\u200b"),  # may be broken there
        "verdict": verdict(result),
        "photos": [] if photos is None else [picture(photo) for photo in photos[:PHOTOS]],
        "groups": [(title, ones) for title, ones in zip(titles, cards, strict=True) if ones],
    }


def card(one: Mapping[str, object], word: str) -> dict[str, str]:
    score = "" if one["score"] is None else f"{word} {decimal(one['score'])}"
    said = {"prompt": one["prompt"], "seed": one["seed"], "score": score}
    return said | {"base": picture(one["base"]), "ours": picture(one["ours"])}


def picture(image: Tensor) -> str:
    """An image (3, H, W) in [0, 1] as part of a page, not larger than it is shown."""
    size = max(image.shape[1:])
    if size > SIDE:
        image = F.interpolate(image[None], scale_factor=SIDE / size, mode="bicubic", antialias=True)[0]
    return data_uri(png(torch.as_tensor(image).clamp(0, 1)))
