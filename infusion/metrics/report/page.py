"""The report of an evaluation as one HTML page that needs nothing else: no network, no script, no file beside it."""

import base64
import io
import random
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from infusion.metrics.report.aggregate import Group, Result, concept_of
from infusion.metrics.report.epochs import epochs_of
from infusion.metrics.report.plots import PLOTS
from infusion.metrics.report.tables import decimal, families, headline, message, notes, percent, titled
from infusion.sampling.pictures import SIDE, png, shrunk, to_image

if TYPE_CHECKING:
    from infusion.metrics.report.output import Measured

TEMPLATES = Path(__file__).with_name("templates")
EXACT = 64  # pixels at most of a picture that is a PNG, not a JPEG
CONCEPTS, ROWS = 4, 2  # shown side by side: concepts, chosen at random, and samples of each
FEW = 12  # groups whose best and worst are unfolded


def page(measured: "Measured", drawn: Mapping[str, str]) -> str:
    """The report as HTML.

    Args:
        measured: at least one result; the first one's group is that with which the others are compared.
        drawn: the plots, SVG by name.
    """
    groups = measured.groups
    results = [result for group in groups for result in group.results]
    shown = {key: ", ".join(map(str, v)) if isinstance(v, list) else v for key, v in measured.settings.items()}
    trainings = epochs_of(results)
    epochs = {f"Epochs of {each.training}" if len(trainings) > 1 else "Epochs": each.in_words() for each in trainings}
    pictures = {name: (*PLOTS[name], data_uri(svg.encode(), "svg+xml")) for name, svg in drawn.items()}
    return render(
        TEMPLATES / "metrics.html.j2",
        message=epochs | message(groups),
        headline=headline(groups),
        notes=notes(groups),
        plane=pictures.pop("tradeoff_lfd", None),
        plots=list(pictures.values()),
        concepts=len({concept_of(result) for result in results}),
        runs=len(results),
        side_by_side=measured.side_by_side,
        extremes={titled(group): found for group in groups if (found := extremes(group))},
        few=len(groups) <= FEW,
        families=families(groups),
        anchored=[titled(group) for group in groups if group.anchored and group.kind == "concept"],
        about={titled(group): about(group) for group in groups},
        protocols=shown.pop("protocols", {}),
        settings=shown,
        files={name: digest for name, digest in measured.files.items() if digest}
        | {result["label"]: result["sha256"] for result in results if result.get("sha256")},
        command=measured.command,
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
    environment.filters |= {"percent": percent, "decimal": decimal, "picture": picture}
    return environment.get_template(template.name).render(values)


def about(group: Group) -> str:
    """How a group's runs came to be, in half a sentence."""

    def each(key: str, form: str = "") -> str:
        return " or ".join(dict.fromkeys(format(one[key], form) for one in group.results if one.get(key) is not None))

    said = f"{len(group.results)} run(s) of {len(group.concepts)} concept(s)"
    if group.kind != "concept":
        return f"{said}; " + (f"told: {each('described')}" if group.kind == "words" else "pictures made elsewhere")
    said += f"; {each('method')}, “{each('noun')}” for “{each('superclass')}”, {each('numbers', ',')} parameters"
    trained = f"{each('training_steps')} steps at learning rate {each('learning_rate', 'g')}"
    return f"{said}, {trained}" + (f", best at step {each('best_step')}" if each("best_step") else "")


# --- pictures ---------------------------------------------------------------------------------------------------------


def side_by_side(groups: Sequence[Group]) -> list[tuple[str, dict[str, Tensor]]]:
    """Samples of one prompt and seed by all groups, a row each: what was asked, and images (3, h, w) by their captions.

    Concepts are drawn by a seed, and so were the samples (`gallery`): nobody has chosen them.
    """
    concepts = list(dict.fromkeys(concept for group in groups for concept in group.concepts))
    names, rows = [Path(concept).name for concept in concepts], []
    for concept in random.Random(0).sample(concepts, min(CONCEPTS, len(concepts))):
        runs = {titled(group): run for group in groups if (run := _first(group, concept))}
        dealt = {
            name: {(one["prompt"], one["seed"]): one for one in _cards(run, "random")} for name, run in runs.items()
        }
        photos = next((run["pictures"]["photos"] for run in runs.values() if _photos(run) is not None), [])
        for i, (prompt, seed) in enumerate(list(dict.fromkeys(key for own in dealt.values() for key in own))[:ROWS]):
            found = {name: own[prompt, seed] for name, own in dealt.items() if (prompt, seed) in own}
            shown = {"a photo": photos[i % len(photos)]} if len(photos) else {}
            base = next((one["base"] for one in found.values() if one["base"] is not None), None)
            shown |= {} if base is None else {"base model": base}
            name = Path(concept).name if names.count(Path(concept).name) == 1 else concept  # folders of one name
            rows.append((f"{name.replace('_', ' ')}: {prompt} (seed {seed})",
                         shown | {name: one["ours"] for name, one in found.items()}))  # fmt: skip
    return rows


def extremes(group: Group) -> dict[str, list[dict[str, str]]]:
    """The best and the worst sample of each concept by likeness, of at most so many concepts as are shown."""
    found = {}
    for title, which, sign in (("Most like the photos", "best", 1), ("Least like the photos", "worst", -1)):
        tops = []
        for concept in group.concepts:
            runs = [run for run in group.results if concept_of(run) == concept]
            scored = [(run, one) for run in runs for one in _cards(run, which) if one["score"] is not None]
            tops += [max(scored, key=lambda pair: sign * pair[1]["score"])] if scored else []
        tops.sort(key=lambda pair: -sign * pair[1]["score"])
        if tops:
            found[title] = [
                {"picture": picture(one["ours"]), "run": run["label"],
                 "text": f"{one['prompt']} (seed {one['seed']}), {decimal(one['score'])}"}
                for run, one in tops[:CONCEPTS]
            ]  # fmt: skip
    return found


def _first(group: Group, concept: str) -> Result | None:
    return next((run for run in group.results if concept_of(run) == concept), None)


def _cards(run: Result, which: str) -> list[Mapping]:
    return (run.get("pictures") or {}).get(which, [])


def _photos(run: Result) -> Tensor | None:
    return (run.get("pictures") or {}).get("photos")


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
