import re

import pytest
import torch

from infusion.metrics.charts import plots
from infusion.metrics.page import page
from infusion.metrics.rows import by_method, families, gathered, shown, verdict
from infusion.metrics.table import Measured
from infusion.metrics.words import FAMILIES, METRICS

IMAGE = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))


def figure(value, stderr=0.02, **more):
    return {"value": value, "stderr": stderr, "n": 4} | more


def result(label="cat", method="dreambooth", anchored=False, **changes):
    zero = 0.0 if anchored else 0.25
    figures = {
        "lfd_context": figure(0.5),
        "lfd_superclass": figure(zero),
        "w2_clip": figure(1.0, low=0.9, high=1.2, floor=figure(0.4)),
        "clip_i": figure(0.3, base=figure(0.1), ceiling=figure(0.6)),
        "clip_t": figure(0.5, base=figure(0.7)),
        "pres": figure(0.2, base=figure(0.1), ceiling=figure(0.6)),
        "drift": figure(zero),
        "right_background": figure(0.96, base=figure(1.0), ceiling=figure(1.0)),
    }
    card = {"prompt": "a <u>cat</u> on sand", "seed": 7, "score": -0.125, "base": IMAGE, "ours": IMAGE}
    curve = [{"step": n} | figure(n / 1000) for n in (100, 200)]
    return {
        "label": label, "method": method, "superclass": "cat", "noun": "sks cat", "training_steps": 200,
        "learning_rate": 0.001, "training_seed": 0, "numbers": 1152, "file": "cat.safetensors", "sha256": "f" * 64,
        "anchored": anchored, "photos": "", "world_concept": "", "figures": figures,
        "timesteps": {"context": [{"timestep": t} | figure(0.1) for t in (250.0, 750.0)]},
        "training": {"context": curve},
        "pictures": {"ranked_by": "clip_i", "photos": IMAGE[None], "best": [card], "worst": [card]},
    } | changes  # fmt: skip


def html(*results):
    protocol = {"concept": ["a <i>{}</i>"], "kin": [["cat"]], "nouns": []}
    settings = {"samples": 4, "metrics": ["lfd", "w2"], "protocol": protocol}
    return page(Measured(results, settings, {"base": "abc"}, "python <script>"), plots(results))


def test_page_needs_nothing_else_and_escapes_what_it_is_given():
    text = html(result(), result("hat", "infusion", anchored=True))
    assert "http" not in text and "<script" not in text and "@import" not in text
    assert set(re.findall(r'src="([^"]{0,22})', text)) == {"data:image/png;base64,"}
    assert not re.findall(r'href="(?!#)', text)
    assert text.count("<img") == text.count("alt=") == 1 + 2 * 4  # photos that both have are shown once
    assert "a &lt;u&gt;cat&lt;/u&gt; on sand" in text and "<u>" not in text and "a &lt;i&gt;{}&lt;/i&gt;" in text
    assert "python &lt;script&gt;" in text and "seed 7" in text and "likeness −0.1" in text
    assert text.count('<svg class="drawing"') == text.count("</svg>") == 4
    assert "prefers-color-scheme: dark" in text and "var(--ink)" in text


def test_zeros_by_construction_are_told_from_others():
    results = [result(), result("hat", "infusion", anchored=True), result("same", "lora", anchored=False)]
    results[2]["figures"]["drift"] = figure(0.0, 0.0)
    rows = {row["label"]: row for table in families(results) for row in table["rows"] if "drift" in
            [column["name"] for column in table["columns"]]}  # fmt: skip
    assert rows["hat"]["cells"][0] == {"value": "0", "error": "by construction"}
    assert rows["same"]["cells"][0] == {"value": "0", "error": ""}
    assert rows["cat"]["cells"][0] == {"value": "0.250", "error": "± 0.020"}
    assert "Zeros that are not a win.</b> hat acts on" in html(*results)
    assert "Zeros that are not a win" not in html(result())
    assert "by construction" in verdict(results[1]) and "drift by 0.25" in verdict(results[0])


def test_results_of_one_method_are_gathered():
    results = [result(), result("dog"), result("hat", "lora")]
    results[1]["figures"]["lfd_context"] = figure(0.7)
    assert [len(own) for own in by_method(results).values()] == [2, 1]
    assert gathered([figure(0.5), figure(0.7)]) == pytest.approx((0.6, 0.1))
    assert gathered([figure(0.5, None)]) == (0.5, 0.0)
    table = next(table for table in families(results) if table["columns"][0]["name"] == "lfd_context")
    rows = {row["label"]: row for row in table["rows"]}
    assert list(rows) == ["cat", "dog", "dreambooth, mean", "hat"]
    assert rows["dreambooth, mean"]["cells"][0] == {"value": "0.60", "error": "± 0.10"}
    assert rows["cat"]["colour"] == rows["dog"]["colour"] != rows["hat"]["colour"]
    assert "dreambooth (2)" in plots(results)["tradeoff_lfd"] and ">hat<" in plots(results)["tradeoff_lfd"]


def test_what_figures_are_read_against_has_rows_of_its_own():
    (first,) = (table for table in families([result()]) if table["columns"][0]["name"] == "clip_i")
    assert [(row["label"], row["cells"][0]["value"]) for row in first["rows"]] == [
        ("base model", "0.100"), ("photos among themselves", "0.600"), ("cat", "0.300")]  # fmt: skip
    assert first["rows"][1]["cells"][1] is None  # CLIP-T has no ceiling
    other = result("dog")
    other["figures"]["clip_i"]["base"] = figure(0.3)
    (first,) = (table for table in families([result(), other]) if table["columns"][0]["name"] == "clip_i")
    assert first["rows"][0]["cells"][0] == {"value": "0.20", "error": "± 0.10"}  # the mean of two


def test_a_long_report_is_folded():
    few, many = html(result(), result("dog")), html(*(result(f"cat {i}") for i in range(13)))
    assert many.count("<details><summary>Most like the photos") == 13 and "<details><summary>Most" not in few
    assert many.count("<details") == many.count("</details>") and 'class="verdicts"' not in many
    assert 'class="verdicts"' in few


def test_plots_are_of_what_has_been_measured():
    assert set(plots([result()])) == {"tradeoff_lfd", "tradeoff_w2", "training_context", "timesteps_context"}
    bare = result(timesteps={}, training={})
    for name in ("clip_i", "clip_t"):
        del bare["figures"][name]
    assert plots([bare]) == {} and "The trade-off" not in html(bare)
    text = html(result(pictures={"ranked_by": "", "photos": None, "best": [], "worst": []}))
    assert "<img" not in text


def test_numbers_show_two_digits_of_their_error():
    assert shown("drift", figure(0.12345, 0.0123)) == {"value": "0.123", "error": "± 0.012"}
    assert shown("drift", figure(-0.5, None)) == {"value": "−0.500", "error": ""}
    assert shown("drift", figure(3e-9, 1e-9)) == {"value": "0", "error": ""}
    assert shown("right_style", figure(0.96, 0.03)) == {"value": "96 %", "error": "± 3 %"}
    assert shown("leakage", figure(0.004, 0.002)) == {"value": "0.4 %", "error": "± 0.2 %"}


def test_every_metric_is_shown_in_one_table():
    names = [name for family in FAMILIES for name in family.metrics]
    assert sorted(names) == sorted(METRICS) and len(names) == len(set(names))
