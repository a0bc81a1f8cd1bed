import re

import pytest
import torch

from infusion.metrics.report.aggregate import groups_of
from infusion.metrics.report.charts import plots
from infusion.metrics.report.page import CARDS, deal, page
from infusion.metrics.report.rows import briefly, differs, families, in_words, shown, verdict
from infusion.metrics.report.table import Measured
from infusion.metrics.report.words import FAMILIES, METRICS

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
        "label": label, "group": method, "method": method, "superclass": "cat", "noun": "sks cat",
        "training_steps": 200, "learning_rate": 0.001, "training_seed": 0, "numbers": 1152,
        "file": "cat.safetensors", "sha256": "f" * 64, "anchored": anchored, "photos": "", "world_concept": "",
        "figures": figures,
        "timesteps": {"context": [{"timestep": t} | figure(0.1) for t in (250.0, 750.0)]},
        "training": {"context": curve},
        "pictures": {"ranked_by": "clip_i", "photos": IMAGE[None], "best": [card], "worst": [card]},
    } | changes  # fmt: skip


def html(*results):
    protocol = {"concept": ["a <i>{}</i>"], "kin": [["cat"]], "nouns": []}
    settings = {"samples": 4, "metrics": ["lfd", "w2"], "protocols": {"usual": protocol}}
    measured = Measured(results, settings, {"base": "abc"}, "python <script>")
    return page(measured, plots(measured.groups))


def many(groups=6, concepts=2, seeds=3):
    """Runs of several groups, whose change around the concept and likeness are known."""
    runs = []
    for group in range(groups):
        for concept in range(concepts):
            for seed in range(seeds):
                one = result(f"way {group}, thing {concept}, {seed}", world_concept=f"thing_{concept}")
                one |= {"group": f"way {group}", "training_seed": seed}
                one["figures"]["lfd_context"] = figure(1.0 + group + 0.1 * concept + 0.01 * group * concept)
                card = one["pictures"]["best"][0]
                scored = [card | {"score": concept + i / 10 + seed / 100} for i in range(4)]
                one["pictures"] = {"ranked_by": "clip_i", "photos": IMAGE.expand(5, -1, -1, -1), "best": scored[::-1],
                                   "worst": scored}  # fmt: skip
                runs.append(one)
    return runs


def tables(*results):
    """Family tables by their first metric's title."""
    return {table["columns"][0]["title"]: table for table in families(groups_of(results))}


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
    rows = {row["label"]: row for row in tables(*results)["drift"]["rows"]}
    assert rows["hat"]["cells"][0] == {"value": "0", "error": "by construction"}
    assert rows["same"]["cells"][0] == {"value": "0", "error": ""}
    assert rows["cat"]["cells"][0] == {"value": "0.250", "error": "± 0.020"}
    assert "Zeros that are not a win.</b> hat acts on" in html(*results)
    assert "Zeros that are not a win" not in html(result())
    first, second, _ = groups_of(results)
    assert "by construction" in verdict(second) and "drift by 0.25" in verdict(first)


def test_results_of_one_group_have_one_row_and_their_own_below():
    results = [result(), result("dog"), result("hat", "lora")]
    results[1]["figures"]["lfd_context"] = figure(0.7)
    table = tables(*results)["around the concept"]
    (cats, hat), runs = table["rows"], table["runs"]
    assert (cats["label"], cats["note"], cats["kind"]) == ("dreambooth", "2 runs, 1 concept", "group")
    assert cats["cells"][0] == {"value": "0.60", "error": "± 0.10"}
    assert (hat["label"], hat["note"]) == ("lora", "") and hat["colour"] != cats["colour"]
    assert [row["label"] for row in runs] == ["cat", "dog", "hat"]
    assert [row["cells"][0]["value"] for row in runs] == ["0.500", "0.700", "0.500"]
    assert runs[0]["colour"] == runs[1]["colour"] == cats["colour"] and runs[2]["colour"] == hat["colour"]
    svg = plots(groups_of(results))["tradeoff_lfd"]
    assert ">dreambooth<" in svg and ">lora<" in svg and ">hat<" not in svg
    assert tables(results[0], results[2])["around the concept"]["runs"] == []  # the rows are those of the runs


def test_a_group_is_anchored_where_all_its_runs_are():
    results = [result(anchored=True), result("dog", anchored=True)]
    assert tables(*results)["drift"]["rows"][-1]["cells"][0]["error"] == "by construction"
    results[1] |= {"anchored": False}
    assert tables(*results)["drift"]["rows"][-1]["cells"][0]["error"] == ""
    assert "Zeros that are not a win" not in html(*results)


def test_what_figures_are_read_against_has_rows_of_its_own():
    first = tables(result())["likeness to the photos (CLIP-I)"]
    assert [(row["label"], row["cells"][0]["value"]) for row in first["rows"]] == [
        ("base model", "0.100"), ("photos among themselves", "0.600"), ("cat", "0.300")]  # fmt: skip
    assert first["rows"][1]["cells"][1] is None  # CLIP-T has no ceiling
    other = result("dog", world_concept="dog")
    other["figures"]["clip_i"]["base"] = figure(0.3)
    first = tables(result(), other)["likeness to the photos (CLIP-I)"]
    assert first["rows"][0]["cells"][0] == {"value": "0.20", "error": "± 0.10"}  # the mean of two


def test_differences_from_the_first_group_are_said_where_they_are_beyond_chance():
    said = {one["label"]: one["beyond"] for one in tables(*many())["around the concept"]["differences"]}
    assert list(said) == [f"way {i}" for i in range(1, 6)]
    # 1 and 1.01: error 0.005, and Student's t of one degree of freedom is 12.7
    assert said["way 1"] == ["around the concept: higher by 1.0050 (0.9415 to 1.0685)"]
    same = {one["label"]: one["beyond"] for one in tables(*many())["drift"]["differences"]}
    assert same == {f"way {i}": [] for i in range(1, 6)}
    text = html(*many())
    assert "Held against <b>way 0</b>" in text and "around the concept: higher by 1.0050" in text
    assert "Held against" not in html(result(), result("hat", "lora"))  # one pair has no error
    ends = [(0.01, 0.3), (-0.3, -0.01), (-0.1, 0.3), (0.0, 0.2)]
    found = [differs({"value": (low + high) / 2, "low": low, "high": high}) for low, high in ends]
    assert found == [True, True, False, False] and not differs({"value": 1e-8, "low": 9e-9, "high": 2e-8})  # rounding
    lower = {"value": -0.125, "stderr": 0.01, "low": -0.16, "high": -0.09}
    assert in_words("right_style", lower) == "style as prompted: lower by 12.5 points (9.0 to 16.0)"


def test_a_page_of_many_runs_shows_a_few_of_their_samples():
    text = html(*many())
    cards, photos = text.count("<figcaption>a &lt;u&gt;cat"), text.count('alt="photo ')
    assert (cards, photos) == (6 * 2 * CARDS, 6 * 2) and text.count("<img") == 2 * cards + photos
    assert text.count("<section>") == 6 and text.count(">thing 1</figcaption>") == 6
    assert "2 particular things in 6 ways, 36 times in all" in text and "6 runs, 2 concepts" in text
    assert text.count("<summary>The 36 runs") == len(tables(result())) == 5
    assert 'class="verdicts"' in text and "way 3, thing 1, 2" in text
    alone = html(result())
    assert "taught to draw something particular" in alone and "runs" not in alone[alone.index("<body") :]


def test_cards_are_of_each_concept_in_turn():
    runs = many(1, 3, 2)
    best = [(run, one["score"]) for run, one in deal(runs, "best", falls=True)]
    assert [score for _, score in best] == pytest.approx([2.31, 1.31, 0.31, 2.3, 1.3, 0.3, 2.21, 1.21])
    assert best[0][0] == "way 0, thing 2, 1"
    worst = [one["score"] for _, one in deal(runs, "worst", falls=False)]
    assert worst == pytest.approx([0, 1, 2, 0.01, 1.01, 2.01, 0.1, 1.1])


def test_a_long_report_is_folded():
    few, folded = html(result(), result("dog")), html(*many(13, 1, 1))
    assert folded.count("<details><summary>Most like the photos") == 13 and "<details><summary>Most" not in few
    assert folded.count("<details") == folded.count("</details>") and 'class="verdicts"' not in folded
    assert 'class="verdicts"' in few and "<details open><summary>The 2 runs" in few
    assert "<details><summary>The 36 runs" in html(*many())


def test_large_pictures_take_little_of_the_page():
    noise = torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(0))
    card = {"prompt": "a cat", "seed": 0, "score": 0.5, "base": noise, "ours": noise}
    one = result(pictures={"ranked_by": "clip_i", "photos": noise[None], "best": [card], "worst": []})
    text = html(one)
    assert text.count("data:image/jpeg;base64,") == 3 and len(text) < len(html(result())) + 3 * 4 / 3 * 50_000


def test_plots_are_of_what_has_been_measured():
    assert set(plots(groups_of([result()]))) == {"tradeoff_lfd", "tradeoff_w2", "training_context", "timesteps_context"}
    bare = result(timesteps={}, training={})
    for name in ("clip_i", "clip_t"):
        del bare["figures"][name]
    assert plots(groups_of([bare])) == {} and "The trade-off" not in html(bare)
    text = html(result(pictures={"ranked_by": "", "photos": None, "best": [], "worst": []}))
    assert "<img" not in text


def test_numbers_show_two_digits_of_their_error():
    assert shown("drift", figure(0.12345, 0.0123)) == {"value": "0.123", "error": "± 0.012"}
    assert shown("drift", figure(-0.5, None)) == {"value": "−0.500", "error": ""}
    assert shown("drift", figure(3e-9, 1e-9)) == {"value": "0", "error": ""}
    assert shown("right_style", figure(0.96, 0.03)) == {"value": "96 %", "error": "± 3 %"}
    assert shown("leakage", figure(0.004, 0.002)) == {"value": "0.4 %", "error": "± 0.2 %"}


def test_sentences_have_two_digits_at_most():
    assert briefly("clip_i", figure(0.6174, 0.0044)) == "0.62" and briefly("clip_i", figure(0.0004, 0.05)) == "0.00"
    assert (
        briefly("lfd_context", figure(0.00356, 0.00016)) == "0.0036" and briefly("drift", figure(-0.2, None)) == "−0.20"
    )


def test_every_metric_is_shown_in_one_table():
    names = [name for family in FAMILIES for name in family.metrics]
    assert sorted(names) == sorted(METRICS) and len(names) == len(set(names))
