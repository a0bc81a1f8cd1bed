"""Reports as one HTML page that needs nothing else: no network, no script, no file beside it."""

import base64
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).with_name("templates")

Figure = Mapping[str, float | int]  # value, stderr, n


def data_uri(content: bytes, kind: str = "png") -> str:
    """An image file as an address that holds the picture itself."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def percent(value: float) -> str:
    """0.25 -> "25 %"."""
    return signed(f"{100 * value:.0f}") + " %"


def decimal(value: float) -> str:
    """0.254 -> "0.25"."""
    return signed(f"{value:.2f}")


def signed(number: str) -> str:
    """The number with a typographic minus, and with none where it has been rounded to zero."""
    return "−" * (float(number) < 0) + number.removeprefix("-")


def of(figure: Figure) -> str:
    """A rate in counts: "31 of 32"."""
    return f"{round(figure['value'] * figure['n'])} of {figure['n']}"


def verdict(figures: Mapping[str, Mapping[str, Figure]]) -> str:
    """What the measurements of one concept say, in two sentences.

    Args:
        figures: metrics `similarity`, `background` and `style`, each with the figures `base` and `infusion`, and
            `similarity` with `difference` and `drawn`, the ceiling, as well.
    """
    like = figures["similarity"]
    base, gain = like["base"]["value"], like["difference"]
    change = f"from {decimal(base)} to {decimal(like['infusion']['value'])}"
    if abs(gain["value"]) <= 2 * gain["stderr"]:
        first = f"Likeness to the photos does not change clearly ({change})."
    elif gain["value"] < 0:
        first = f"Likeness to the photos falls {change}: this concept was not learned."
    else:
        room = like["drawn"]["value"] - base
        share = f", {percent(gain['value'] / room)} of the way to the ceiling" if room > 0 else ""
        first = f"Likeness to the photos rises {change}{share}."
    ground, style = (f"{of(figures[name]['infusion'])} samples" for name in ("background", "style"))
    before = [of(figures[name]["base"]) for name in ("background", "style")]
    second = f"The prompted background is right in {ground} (base model: {before[0]})"
    return f"{first} {second}, the prompted style in {style} (base model: {before[1]})."


def render(template: str, **values: object) -> str:
    """Fill in a template of `infusion/metrics/report/templates`; every value is escaped.

    Raises:
        jinja2.UndefinedError: the template wants a value that is not given.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "decimal": decimal, "of": of, "verdict": verdict}
    return environment.get_template(template).render(values)
