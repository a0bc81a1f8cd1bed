import re
from html import escape

import jinja2
import pytest
import torch

from infusion.metrics.report import page as report
from infusion.metrics.report.aggregate import groups_of
from infusion.metrics.report.output import Measured
from infusion.metrics.report.page import CONCEPTS, extremes, side_by_side
from infusion.metrics.report.plots import PLOTS
from tests.infusion.metrics.report.conftest import IMAGE, described, result, study

DRAWN = dict.fromkeys(list(PLOTS)[:4], "<svg/>")


def html(*results, drawn=DRAWN):
    protocol = {"concept": ["a <i>{}</i>"], "kin": [["cat"]], "nouns": []}
    settings = {"samples": 4, "metrics": ["lfd", "w2"], "protocols": {"usual": protocol}}
    return report.page(Measured(results, settings, {"base": "abc"}, "python <script>"), drawn)


def test_page_needs_nothing_else_and_escapes_what_it_is_given():
    said = html(result(), result("hat", "infusion", anchored=True), described(anchored=True))
    assert "http" not in said and "<script" not in said and "@import" not in said and "href" not in said
    assert set(re.findall(r'src="(data:image/[^;]*|[^"]{0,22})', said)) == {"data:image/png", "data:image/svg+xml"}
    assert said.count("<img") == said.count("alt=") == 4 + 5 + 3 * 2  # plots; photo, base and three; best and worst
    assert "a &lt;u&gt;cat&lt;/u&gt; on sand" in said and "<u>" not in said and "a &lt;i&gt;{}&lt;/i&gt;" in said
    assert "python &lt;script&gt;" in said and "prefers-color-scheme: dark" in said
    assert "Zeros that are not a win.</b> hat acts only on" in said and "told: a red cat" in said


@pytest.mark.parametrize("word", ["<script>alert(1)</script>", '"><img src=x>', "</svg><b>", "{{ 7 * 7 }}", "x$_{$"])
def test_words_of_others_stay_words(word):
    names = ("label", "superclass", "noun", "file", "group", "world_concept", "method", "sha256")
    hostile = result() | dict.fromkeys(names, word)
    hostile["pictures"]["best"][0]["prompt"] = word
    plain, attacked = html(result()), html(hostile)
    assert plain.count("<") == attacked.count("<") and escape(word).replace("&quot;", "&#34;") in attacked


def test_a_value_that_is_not_given_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        report.render(report.TEMPLATES / "metrics.html.j2", groups=[])


def test_the_first_screen_has_message_table_and_plane_in_this_order():
    said = html(*study(infusion=0.4, words=0.3, lora=0.2))
    places = [said.index(part) for part in ("Words alone reach 0.30", "from infusion (Holm)", PLOTS["tradeoff_lfd"][0],
                                            "<h2>Side by side", "<h2>All figures")]  # fmt: skip
    assert places == sorted(places) and "[primary]" in said and "everything else is exploratory" in said


def test_a_row_is_of_one_prompt_and_seed():
    runs = study(infusion=0.4, words=0.3, lora=0.2)
    other = {"prompt": "a cat at sea", "seed": 9, "score": 0.1, "base": IMAGE, "ours": 1 - IMAGE}
    for one in runs[:6]:
        one["pictures"] = one["pictures"] | {"random": [other, *one["pictures"]["random"]]}
    rows = side_by_side(groups_of(runs))
    assert len(rows) == 2 * CONCEPTS == len({said for said, _ in rows})
    assert [list(pictures) for _, pictures in rows[:2]] == [
        ["a photo", "base model", "infusion"], ["a photo", "base model", "infusion", "words", "lora"]
    ]  # fmt: skip
    assert rows[0][0].endswith(": a cat at sea (seed 9)")
    for (said, shown), (again, as_before) in zip(rows, side_by_side(groups_of(runs)), strict=True):
        assert said == again and list(shown) == list(as_before)
        assert all(shown[name].equal(as_before[name]) for name in shown)
    assert not rows[0][1]["infusion"].equal(rows[1][1]["infusion"])


def test_folders_of_one_name_have_rows_of_their_own():
    runs = [result(f"cat {place}", photos=f"{place}/cat") for place in ("home", "street")]
    titles = [said for said, _ in side_by_side(groups_of(runs))]
    assert len(titles) == len(set(titles)) and {said.split(":")[0] for said in titles} == {"home/cat", "street/cat"}


def test_best_and_worst_are_of_different_concepts():
    runs = study(infusion=0.4)
    for i, one in enumerate(runs):
        card = one["pictures"]["best"][0]
        one["pictures"] = one["pictures"] | {which: [card | {"score": i + s} for s in (0.1, 0.2)]
                                             for which in ("best", "worst")}  # fmt: skip
    found = extremes(groups_of(runs)[0])
    best, worst = ([card["text"].split()[-1] for card in cards] for cards in found.values())
    assert best == ["5.20", "4.20", "3.20", "2.20"] and worst == ["0.10", "1.10", "2.10", "3.10"]


def test_large_pictures_take_little_of_the_page():
    noise = torch.rand(3, 512, 512, generator=torch.Generator().manual_seed(0))
    card = {"prompt": "a cat", "seed": 0, "score": 0.5, "base": noise, "ours": noise}
    one = result(pictures={"ranked_by": "clip", "photos": noise[None], "random": [card], "best": [card], "worst": []})
    said = html(one)
    assert said.count("data:image/jpeg;base64,") == 4 and len(said) < len(html(result())) + 4 * 4 / 3 * 50_000


def test_what_was_not_measured_is_not_shown():
    bare = result(timesteps={}, training={}, pictures={"ranked_by": "", "photos": None, "random": []})
    del bare["figures"]["clip_i"]
    said = html(bare, drawn={})
    assert "Side by side" not in said and "More plots" not in said and "<img" not in said and "Best and" not in said
