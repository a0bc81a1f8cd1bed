import re
from html import escape

import jinja2
import pytest
import torch

from infusion.metrics.report import page as report
from infusion.metrics.report.aggregate import groups_of
from infusion.metrics.report.page import CARDS, deal, decimal, differs, families, in_words, percent, text, verdict
from infusion.metrics.report.plots import PLOTS, plots
from infusion.metrics.report.words import METRICS

DRAWN = dict.fromkeys(list(PLOTS)[:4], "<svg/>")
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


def html(*results, drawn=DRAWN):
    protocol = {"concept": ["a <i>{}</i>"], "kin": [["cat"]], "nouns": []}
    settings = {"samples": 4, "metrics": ["lfd", "w2"], "protocols": {"usual": protocol}}
    groups = groups_of(results)
    return report.page(groups, drawn, settings, {"base": "abc"}, "python <script>")


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
    """Family tables by their question's last word."""
    return {one["question"].split()[-1]: one for one in families(groups_of(results))}


def cell(frame, label, start):
    """The cell of a row in the first column whose title begins so."""
    return frame.loc[label, next(column for column in frame.columns if column.startswith(start))]


def test_page_needs_nothing_else_and_escapes_what_it_is_given():
    said = html(result(), result("hat", "infusion", anchored=True))
    assert "http" not in said and "<script" not in said and "@import" not in said and "href" not in said
    assert set(re.findall(r'src="(data:image/[^;]*|[^"]{0,22})', said)) == {"data:image/png", "data:image/svg+xml"}
    assert said.count("<img") == said.count("alt=") == 4 + 1 + 2 * 4  # plots; photos that both have are shown once
    assert "a &lt;u&gt;cat&lt;/u&gt; on sand" in said and "<u>" not in said and "a &lt;i&gt;{}&lt;/i&gt;" in said
    assert "python &lt;script&gt;" in said and "(seed 7, likeness −0.1" in said
    assert "prefers-color-scheme: dark" in said


@pytest.mark.parametrize("word", ["<script>alert(1)</script>", '"><img src=x>', "</svg><b>", "{{ 7 * 7 }}", "_$x_{$"])
def test_words_of_others_stay_words(word):
    names = ("label", "superclass", "noun", "file", "group", "world_concept", "method", "sha256")
    hostile = result() | dict.fromkeys(names, word)
    hostile["pictures"]["best"][0]["prompt"] = word
    plain, attacked = html(result()), html(hostile)
    assert plain.count("<") == attacked.count("<") and escape(word).replace("&quot;", "&#34;") in attacked


def test_a_value_that_is_not_given_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        report.render(report.TEMPLATES / "metrics.html.j2", groups=[])


def test_zeros_by_construction_are_told_from_others():
    results = [result(), result("hat", "infusion", anchored=True), result("same", "lora")]
    results[2]["figures"]["drift"] = figure(0.0, 0.0)
    frame = tables(*results)["concept?"]["table"]
    drifts = [cell(frame, label, "drift") for label in ("hat", "same", "cat")]
    assert drifts == ["0 by construction", "0", "0.250 ± 0.020"]
    assert "Zeros that are not a win.</b> hat acts only on" in html(*results)
    assert "Zeros that are not a win" not in html(result())
    first, second, _ = groups_of(results)
    assert "by construction" in verdict(second) and "drift by 0.250 ± 0.020" in verdict(first)


def test_results_of_one_group_have_one_row_and_their_own_below():
    results = [result(), result("dog"), result("hat", "lora")]
    results[1]["figures"]["lfd_context"] = figure(0.7)
    found = tables(*results)["changed?"]
    assert found["table"].index.tolist() == ["dreambooth (2 runs, 1 concept)", "lora"]
    assert found["table"].iloc[0, 0] == "0.60 ± 0.10"
    assert found["runs"].index.tolist() == ["cat", "dog", "hat"]
    assert found["runs"].iloc[:, 0].str[:5].tolist() == ["0.500", "0.700", "0.500"]
    svg = plots(groups_of(results))["tradeoff_lfd"]
    assert ">dreambooth<" in svg and ">lora<" in svg and ">hat<" not in svg
    assert tables(results[0], results[2])["changed?"]["runs"] is None  # the rows are those of the runs


def test_a_group_is_anchored_where_all_its_runs_are():
    results, label = [result(anchored=True), result("dog", anchored=True)], "dreambooth (2 runs, 1 concept)"
    assert cell(tables(*results)["concept?"]["table"], label, "drift") == "0 by construction"
    results[1] |= {"anchored": False}
    assert cell(tables(*results)["concept?"]["table"], label, "drift") == "0"
    assert "Zeros that are not a win" not in html(*results)


def test_what_figures_are_read_against_has_rows_of_its_own():
    frame = tables(result())["there?"]["table"]
    assert [(label, cell(frame, label, "likeness")) for label in frame.index] == [
        ("base model", "0.100 ± 0.020"), ("photos among themselves", "0.600 ± 0.020"), ("cat", "0.300 ± 0.020")
    ]  # fmt: skip
    assert cell(frame, "photos among themselves", "agreement") == ""  # CLIP-T has no ceiling
    other = result("dog", world_concept="dog")
    other["figures"]["clip_i"]["base"] = figure(0.3)
    frame = tables(result(), other)["there?"]["table"]
    assert cell(frame, "base model", "likeness") == "0.20 ± 0.10"  # the mean of two


def test_differences_from_the_first_group_are_said_where_they_are_beyond_chance():
    found = tables(*many())
    said = found["changed?"]["differences"]
    assert list(said) == [f"way {i}" for i in range(1, 6)]
    # 1 and 1.01: error 0.005, and Student's t of one degree of freedom is 12.7
    assert said["way 1"] == ["around the concept: higher by 1.0050 (0.9415 to 1.0685)"]
    assert found["concept?"]["differences"] == {f"way {i}": [] for i in range(1, 6)}
    page = html(*many())
    assert "Compared with <b>way 0</b>" in page and "around the concept: higher by 1.0050" in page
    assert "Compared with" not in html(result(), result("hat", "lora"))  # one pair has no error
    ends = [(0.01, 0.3), (-0.3, -0.01), (-0.1, 0.3), (0.0, 0.2)]
    beyond = [differs({"value": (low + high) / 2, "low": low, "high": high}) for low, high in ends]
    assert beyond == [True, True, False, False] and not differs({"value": 1e-8, "low": 9e-9, "high": 2e-8})  # rounding
    lower = {"value": -0.125, "stderr": 0.01, "low": -0.16, "high": -0.09}
    assert in_words("right_style", lower) == "style as prompted: lower by 12.5 points (9.0 to 16.0)"


def test_a_page_of_many_runs_shows_a_few_of_their_samples():
    said = html(*many())
    cards, photos = said.count("<figcaption>a &lt;u&gt;cat"), said.count('alt="photo ')
    assert (cards, photos) == (6 * 2 * CARDS, 2)
    assert said.count(">thing 1</figcaption>") == 1 and "way 3, thing 1, 2" in said
    assert "2 particular things" in said and "36 trainings in 6 ways" in said and "6 runs, 2 concepts" in said
    assert said.count("<summary>The 36 runs") == len(tables(result())) == 5
    assert "one particular thing" in html(result()) and "(1 training)" in html(result())


def test_cards_are_of_each_concept_in_turn():
    runs = many(1, 3, 2)
    best = [(run, one["score"]) for run, one in deal(runs, "best", falls=True)]
    assert [score for _, score in best] == pytest.approx([2.31, 1.31, 0.31, 2.3, 1.3, 0.3, 2.21, 1.21])
    assert best[0][0] == "way 0, thing 2, 1"
    worst = [one["score"] for _, one in deal(runs, "worst", falls=False)]
    assert worst == pytest.approx([0, 1, 2, 0.01, 1.01, 2.01, 0.1, 1.1])


def test_a_long_report_is_folded():
    few, folded = html(result(), result("dog")), html(*many(13, 1, 1))
    assert folded.count("<details><summary>Most like the photos") == 13
    assert "<details open><summary>Most like the photos" in few and "<details open><summary>The 2 runs" in few
    assert 'id="verdicts"' in few and 'id="verdicts"' not in folded
    assert "<details><summary>The 36 runs" in html(*many())


def test_large_pictures_take_little_of_the_page():
    noise = torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(0))
    card = {"prompt": "a cat", "seed": 0, "score": 0.5, "base": noise, "ours": noise}
    one = result(pictures={"ranked_by": "clip_i", "photos": noise[None], "best": [card], "worst": []})
    said = html(one)
    assert said.count("data:image/jpeg;base64,") == 3 and len(said) < len(html(result())) + 3 * 4 / 3 * 50_000


def test_what_was_not_measured_is_not_shown():
    bare = result(timesteps={}, training={}, pictures={"ranked_by": "", "photos": None, "best": [], "worst": []})
    for name in ("clip_i", "clip_t"):
        del bare["figures"][name]
    said = html(bare, drawn={})
    assert "The trade-off" not in said and "When it changes" not in said and "<img" not in said


def test_numbers_show_two_digits_of_their_error():
    assert text("drift", figure(0.12345, 0.0123)) == "0.123 ± 0.012"
    assert text("drift", figure(-0.5, None)) == "−0.500" and text("drift", figure(3e-9, 1e-9)) == "0"
    assert text("right_style", figure(0.96, 0.03)) == "96 % ± 3 %"
    assert text("leakage", figure(0.004, 0.002)) == "0.4 % ± 0.2 %" and text("leakage", figure(1.0, 0.0)) == "100 %"
    assert (decimal(-0.254), decimal(-0.001), decimal(0.5)) == ("−0.25", "0.00", "0.50")
    assert (percent(-0.0313), percent(1), percent(-0.001)) == ("−3 %", "100 %", "0 %")


def test_every_metric_says_what_it_is():
    assert len(METRICS) == 19 and all(metric.title and metric.text.endswith(".") for metric in METRICS.values())
