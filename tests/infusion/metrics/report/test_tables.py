import pytest

from infusion.metrics.report.aggregate import groups_of
from infusion.metrics.report.tables import (
    decimal,
    families,
    headline,
    listed,
    markdown,
    message,
    notes,
    percent,
    step,
    table,
    text,
)
from infusion.metrics.report.words import METRICS, metric_of
from tests.infusion.metrics.report.conftest import described, figure, result, study


def test_figures_show_two_digits_of_their_error():
    assert text("drift", figure(0.12345, 0.0123)) == "0.123 ± 0.012"
    assert text("drift", figure(-0.5, None)) == "−0.500" and text("drift", figure(3e-9, 1e-9)) == "0"
    assert text("right_style", figure(0.96, 0.03)) == "96 % ± 3 %"
    assert text("leakage", figure(0.004, 0.002)) == "0.4 % ± 0.2 %" and text("leakage", figure(1.0, None)) == "100 %"
    assert (decimal(-0.254), decimal(-0.001), decimal(0.5)) == ("−0.25", "0.00", "0.50")
    assert (percent(-0.0313), percent(1), percent(-0.001)) == ("−3 %", "100 %", "0 %")


def test_rows_of_what_figures_are_read_against_and_of_groups():
    frame = table(groups_of([result(), result("hat", "infusion", anchored=True)]), ["clip_i", "w2_clip", "drift"])
    assert frame.index.tolist() == ["base model", "floor", "ceiling", "cat", "hat"]
    assert frame.iloc[:, 0].tolist() == ["0.100 ± 0.020", "", "0.600 ± 0.020", "0.300 ± 0.020", "0.300 ± 0.020"]
    assert frame.iloc[1, 1] == "0.400 ± 0.020" and frame.loc["hat"].iloc[2] == "0 by construction"
    assert frame.columns.tolist() == ["likeness (CLIP-I) ↑ [primary]", "W2, CLIP features ↓", "drift ↓"]
    assert frame.index.name == "± over the samples of a run"


def test_an_lfd_stands_beside_its_method_s_own_floor():
    frame = table(groups_of([result(), described()]), ["lfd_context"])
    assert frame.iloc[:, 0].tolist() == ["0.500 ± 0.020 (floor 0.100)", ""] and "floor" not in frame.index


def test_marks_tell_primary_differences_from_exploratory_ones():
    runs = study(infusion=0.4, lora=0.41, dreambooth=0.4)
    for i, one in enumerate(runs):
        one["figures"]["drift"] = figure(0.1 * (i // 6) + 0.01 * (i % 2 + i // 6 * (i % 3)))
    groups = groups_of(runs)
    marked = table(groups, ["clip_i", "lfd_context", "drift"]).iloc[-3:]
    assert ["*" in cell for cell in marked.iloc[:, 0]] == [False, True, False]
    assert "*" in marked.iloc[1, 1] and marked.iloc[1, 2].endswith("°") and "°" not in marked.iloc[0, 2]
    assert "Holm over all 4 comparisons" in notes(groups)
    head = headline(groups)
    assert [name.strip() for name in head.columns][1::2] == ["from infusion (Holm)"] * 2
    assert head.iloc[-2, 1].startswith("0.01, p 0.0") and head.iloc[-2, 3].startswith("× 2.0, p < 0.001")


def test_steps_in_words():
    assert step("drift", {"scale": "difference", "value": -0.1, "p": 0.5, "p_holm": 0.31}) == "−0.10, p 0.31"
    assert step("lfd_context", {"scale": "ratio", "value": 0.791, "p": 0.0123}) == "× 0.79, p 0.01"
    assert step("noun", {"scale": "difference", "value": 0.1, "p": None}) == "10 points" and step("noun", None) == ""


def test_the_message_is_in_words():
    runs = study(infusion=0.4, words=0.3, lora=0.2, dreambooth=0.4)
    for one in runs[:6]:
        one["figures"] |= {"noun": figure(0.97, base=figure(1.0)), "right_style": figure(0.8, base=figure(0.99))}
        one["anchored"] = True
    said = message(groups_of(runs))
    assert said["Concept"] == "infusion reaches a likeness of 0.40 (untouched model 0.10, photos 0.60)."
    assert said["Rest of prompt"] == (
        "infusion keeps the noun (97 %) and the background (96 %) and loses some of the style (80 %, untouched 99 %). "
        "Prompts without the concept are untouched by construction."
    )
    assert said["Words"] == (
        "Words alone reach 0.30. Better than its words: infusion and dreambooth. Does not beat its words: lora."
    )
    assert (
        said["Likeness"].startswith("Worse: lora (−0.20, p") and "no difference shown: dreambooth" in said["Likeness"]
    )
    assert said["Surroundings"].startswith("Worse: lora (× 4.0, p < 0.001) and dreambooth (× 8.0")


def test_one_concept_is_not_tested():
    groups = groups_of([result(), result("hat", "lora"), described()])
    said = message(groups)
    assert "Likeness" not in said and said["Words"] == "Words alone reach 0.30."
    assert "no difference is tested" in notes(groups) and "p " not in headline(groups).to_string()


def test_an_unknown_metric_is_shown_by_its_name():
    assert metric_of("kid_deep").head == "kid deep" and metric_of("clip_i") is METRICS["clip_i"]
    one = result()
    one["figures"]["kid_deep"] = figure(0.3)
    title, _, frame = families(groups_of([one]))[-1]
    assert title == "Others" and frame.loc["cat"].tolist() == ["0.300 ± 0.020"]


def test_lists_in_words_and_tables_in_markdown():
    assert [listed("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    lines = markdown(table(groups_of([result()]), ["drift"])).splitlines()
    assert lines == ["| ± over the samples of a run | drift ↓ |", "| --- | --- |", "| cat | 0.250 ± 0.020 |"]


@pytest.mark.parametrize("kind", ["concept", "pictures"])
def test_pictures_made_elsewhere_stand_beside_methods(kind):
    runs = study(infusion=0.4, elsewhere=0.3)
    for one in runs[6:]:
        one |= {"kind": kind, "training_seed": None}
        del one["figures"]["lfd_context"]
    frame = headline(groups_of(runs))
    cells = frame.loc["elsewhere"].tolist()
    assert cells[1].startswith("−0.10, p") and cells[2:] == [""]  # no LFD, and no difference of it
