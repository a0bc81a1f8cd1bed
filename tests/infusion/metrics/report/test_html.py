import base64
import re

import jinja2
import pytest

from infusion.metrics.report.html import data_uri, decimal, of, percent, render, verdict
from scripts.pocket.demo import METRICS

IMAGE = data_uri(b"png")


def figure(value, stderr=0.02):
    return {"value": value, "stderr": stderr, "n": 32}


def figures(base=0.1, infusion=0.6, drawn=0.7, gain_error=0.02):
    columns = {"base": figure(base), "infusion": figure(infusion), "drawn": figure(drawn)}
    gain = figure(infusion - base, gain_error)
    rates = {"base": figure(1.0), "infusion": figure(0.9375), "drawn": figure(1.0), "difference": figure(-0.0625)}
    likeness = columns | {"difference": gain, "photos": figure(0.95)}
    return {"similarity": likeness, "background": rates, "style": rates}


def concept(**changes):
    card = {
        "prompt": "a photo of a hat on <b>grass</b>",
        "seed": 7,
        "base": IMAGE,
        "infusion": IMAGE,
        "attention": IMAGE,
    }
    return {
        "name": "zigzag_hat", "title": "Zigzag & hat", "level": 2, "level_text": "a pattern", "superclass": "hat",
        "setting": "on water", "photos": [IMAGE] * 5, "columns": [card], "figures": figures(), "numbers": 1152,
        "masks": {"value": 0.9}, "masked_by": "CLIPSeg", "layers": 7, "file": "hat.safetensors", "bytes": 6720,
        "steps": 300, "learning_rate": 0.01, "seconds": 99.6, "share": 0.25,
        "train_command": "python main.py 'a' <script>", "sample_command": "python scripts/x.py",
    } | changes  # fmt: skip


def page(*concepts, **changes):
    values = {
        "concepts": concepts, "settings": {"samples": 32, "base_model": "pocket"}, "metrics": METRICS, "low": -0.3,
        "photo_columns": 5, "date": "2024-05-01 10:00", "minutes": "8.1", "command": "python scripts/demo.py",
    }  # fmt: skip
    return render("demo.html.j2", **values | changes)


def test_page_needs_nothing_else_and_escapes_what_it_is_given():
    html = page(concept(), concept(name="dog", share=None))
    assert "http" not in html and "<script" not in html and "@import" not in html and "url(" not in html
    assert set(re.findall(r'src="([^"]{0,22})', html)) == {"data:image/png;base64,"}
    assert html.count("<img") == html.count("alt=") == 2 * (5 + 3)
    assert "a photo of a hat on &lt;b&gt;grass&lt;/b&gt;" in html and "<b>grass" not in html
    assert "Zigzag &amp; hat" in html and "&#39;a&#39; &lt;script&gt;" in html
    assert html.count("25 % of what it is added to") == 1
    assert "1,152" in html and "seed 7" in html and "300 steps at learning rate 0.01, 100 s" in html
    assert html.lstrip().startswith("<!doctype html>")


def test_plots_put_their_marks_on_the_scale():
    html = page(concept(figures=figures(base=-0.3, infusion=1.0, drawn=0.35)))
    marks = re.findall(r'<circle class="(\w+)" cx="([\d.]+)"', html)
    assert marks[:2] == [("base", "10.0"), ("infusion", "290.0")]
    assert re.findall(r'class="ceiling" x1="([\d.]+)"', html)[0] == "150.0"
    assert 'aria-label="base model −0.30, Infusion 1.00, ceiling 0.35"' in html


def test_a_value_that_is_not_given_is_an_error():
    incomplete = concept()
    del incomplete["setting"]
    with pytest.raises(jinja2.UndefinedError, match="setting"):
        page(incomplete)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, "Likeness to the photos rises from 0.10 to 0.60, 83 % of the way to the ceiling."),
        ({"infusion": 0.13}, "Likeness to the photos does not change clearly (from 0.10 to 0.13)."),
        ({"infusion": -0.2}, "Likeness to the photos falls from 0.10 to −0.20: this concept was not learned."),
        ({"drawn": 0.1}, "Likeness to the photos rises from 0.10 to 0.60."),
    ],
)
def test_verdict_follows_the_figures(changes, said):
    rest = (
        " The prompted background is right in 30 of 32 samples (base model: 32 of 32), "
        "the prompted style in 30 of 32 samples (base model: 32 of 32)."
    )
    assert verdict(figures(**changes)) == said + rest


def test_numbers_read_well():
    assert (decimal(-0.254), decimal(-0.001), decimal(0.5)) == ("−0.25", "0.00", "0.50")
    assert (percent(-0.0313), percent(1), percent(-0.001)) == ("−3 %", "100 %", "0 %")
    assert of({"value": 31 / 32, "stderr": 0.0, "n": 32}) == "31 of 32"
    assert base64.b64decode(data_uri(b"abc").partition(",")[2]) == b"abc"
