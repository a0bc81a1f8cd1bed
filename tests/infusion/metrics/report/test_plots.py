import re
from itertools import pairwise

import pytest

from infusion.methods import method_names
from infusion.metrics.report.plots import GREY, PALETTE, Point, Series, colours, curves, inline, plane

POINTS = [
    Series("lora", "#2f7fc4", (Point(0.3, 0.5, 0.02, 0.03),)),
    Series("base <model>", "#7a828f", (Point(0, 0.1),)),
]


def test_a_method_keeps_its_colour():
    methods = colours(method_names())
    assert len(set(methods.values())) == len(methods) and set(methods.values()) <= set(PALETTE)
    some = colours(["hard gate", "lora", "no mask"])
    assert some["lora"] == methods["lora"] and set(some.values()) <= set(PALETTE)


def test_no_two_names_share_a_colour():
    names = [*method_names(), *(f"ablation {i}" for i in range(40))]
    found = colours(names)
    assert list(found) == names and len(set(found.values())) == len(names) and GREY not in found.values()
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in found.values())
    assert colours(names[::-1])["lora"] == found["lora"]


def test_a_plane_names_its_points_and_levels():
    svg = plane(POINTS, "LFD", "likeness", {"photos": 0.8})
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert {"lora", "base &lt;model&gt;", "photos", "LFD", "likeness"} <= set(texts)
    assert svg == plane(POINTS, "LFD", "likeness", {"photos": 0.8})


@pytest.mark.parametrize("high", [0.018, 0.0019, 0.0014, 0.7, 17_000])
def test_the_labels_of_an_axis_stand_apart(high):
    svg = plane([Series("lora", "#2f7fc4", (Point(high, 0.5, high / 9, 0.1),))], "LFD", "likeness")
    labels = re.findall(r'anchor: middle; fill: #23262c" x="([\d.]+)" [^>]*>([\d.]+)</text>', svg)
    assert len(labels) >= 3
    for (place, text), (next_place, next_text) in pairwise((float(x), text) for x, text in labels):
        assert next_place - place > 6.4 * (len(text) + len(next_text)) / 2 + 8  # 6.4: a digit of DejaVu Sans at 10 pt


def test_names_do_not_cover_each_other():
    close = [Series(f"method{i}", "#2f7fc4", (Point(0.3, 0.5 + i / 100),)) for i in range(3)]
    svg = plane(close, "x", "y")
    places = re.findall(r"translate\(([\d.]+) ([\d.]+)\)[^>]*>method\d", svg)
    places = places or re.findall(r'x="([\d.]+)" y="([\d.]+)"[^>]*>method\d', svg)
    assert len(places) == 3
    for i, (x, y) in enumerate(places):
        for u, v in places[:i]:
            assert abs(float(x) - float(u)) > 40 or abs(float(y) - float(v)) > 9


def test_a_name_keeps_clear_of_bars():
    wide = Series("wide", "#2f7fc4", (Point(0.5, 0.5, x_error=0.2),))
    near, corner = Series("near", "#2f9e73", (Point(0.5, 0.46),)), Series("corner", "#7a828f", (Point(0, 0),))
    svg = plane([wide, near, corner], "x", "y")  # just above its point, the name would lie on the bar
    (name,) = re.findall(r"translate\([\d.]+ ([\d.]+)\)[^>]*>near|y=\"([\d.]+)\"[^>]*>near", svg)
    (bar,) = set(re.findall(r'd="M [\d.]+ ([\d.]+) \nL [\d.]+ \1 [^>]*stroke: #2f7fc4', svg))
    baseline = float("".join(name))
    assert not baseline - 10 < float(bar) < baseline + 2


def test_in_a_page_it_takes_the_pages_colours():
    body = inline(curves([Series("a", "#2f7fc4", (Point(0, 1), Point(1, 2, 0, 0.1)))], "step", "LFD"))
    assert body.startswith('<svg class="drawing" viewBox=') and body.endswith("</svg>")
    assert "http" not in body and "xlink" not in body and "metadata" not in body
    assert "var(--ink)" in body and "var(--line)" in body and "#23262c" not in body and "#2f7fc4" in body
    for name in set(re.findall(r'href="#([^"]+)"', body)):
        assert f'id="{name}"' in body


def test_a_curve_shows_zero():
    svg = curves([Series("a", "#2f7fc4", (Point(0, 10), Point(1, 11)))], "step", "LFD")
    assert re.search(r">0(\.0)?</text>", svg)
