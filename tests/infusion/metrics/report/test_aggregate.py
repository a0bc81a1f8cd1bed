from math import exp, log, sqrt

import numpy as np
import pytest
from scipy import stats

from infusion.metrics.report.aggregate import (
    CONCEPTS,
    SAMPLES,
    beyond,
    concept_of,
    difference,
    errors_over,
    figures_of,
    gather,
    groups_of,
    holm,
)
from scripts.coverage import CASES, coverage
from tests.infusion.metrics.report.conftest import figure, run, study


def test_a_concept_counts_once_however_many_runs_it_has():
    cats, dogs, owls = [run(1.0), run(2.0, seed=1), run(3.0, seed=2)], [run(4.0, "dog")], [run(9.0, "owl")]
    found = figures_of([*cats, *dogs, *owls], CONCEPTS)["drift"]  # means 2, 4, 9
    assert found == pytest.approx({"value": 5.0, "stderr": sqrt((9 + 1 + 16) / 2 / 3), "n": 5, "concepts": 3})


def test_one_meaning_of_an_error_in_a_report():
    one, many = [run(0.5), run(0.7, seed=1)], [run(0.5), run(0.6, "dog"), run(0.5, group="b")]
    assert errors_over(one) == SAMPLES and errors_over(many) == CONCEPTS
    assert groups_of(one)[0].figures["drift"] == pytest.approx({"value": 0.6, "stderr": 0.02, "n": 2, "concepts": 1})
    several, single = (group.figures["drift"]["stderr"] for group in groups_of(many))
    assert several == pytest.approx(0.05) and single is None  # one concept of a report over concepts tells no error
    assert gather([("cat", figure(0.5, None))], SAMPLES)["stderr"] is None


def test_no_error_where_nothing_varies_between_concepts():
    """A group of which every run is right does not look less certain than one with failures."""
    perfect = [("cat", figure(1.0, 0.3)), ("dog", figure(1.0, 0.4))]
    assert gather(perfect, CONCEPTS) == {"value": 1.0, "stderr": None, "n": 2, "concepts": 2}


def test_what_a_figure_is_read_against_is_gathered_alike():
    runs = [run(figure(0.5, base=figure(0.1, 0.05), floor=figure(0.2))) for _ in range(3)]
    runs.append(run(figure(0.5, base=figure(0.3, 0.05), ceiling_decoded=figure(0.8)), "dog"))
    found = figures_of(runs, CONCEPTS)["drift"]
    assert found["base"] == pytest.approx({"value": 0.2, "stderr": 0.1, "n": 4, "concepts": 2})
    assert found["ceiling_decoded"]["value"] == 0.8 and "ceiling" not in found


def test_concepts_are_told_by_what_is_known():
    assert concept_of(run(0, "hat", photos="photos/cat")) == "hat"
    assert concept_of(run(0, "", photos="photos/cat/")) == concept_of(run(0, "", photos="photos/cat")) == "photos/cat"
    assert concept_of(run(0, "")) == "thing"


def test_a_difference_is_of_pairs_of_one_concept_and_seed():
    ours = [run(1.5), run(1.7, seed=1), run(2.0, "dog"), run(9.9, "owl"), run(9.9, seed=7)]
    theirs = [run(1.0), run(1.0, seed=1), run(1.0, "dog"), run(0.0, "owl", seed=3), run(0.0, "bee")]
    found = difference(ours, theirs, "drift")  # cat: 0.5 and 0.7, dog: 1.0
    reach = 12.7062 * 0.2  # Student's t of one degree of freedom
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.8, 0.8 - reach, 0.8 + reach), rel=1e-4)
    assert found["p"] == pytest.approx(stats.ttest_rel([1.6, 2.0], [1.0, 1.0]).pvalue) and found["concepts"] == 2


def test_words_pair_with_every_seed_of_their_concept():
    words = [run(0.2, seed=None), run(0.4, "dog", seed=None)]
    ours = [run(0.5), run(0.7, seed=1), run(0.4, "dog", seed=5), run(9.0, "owl")]
    assert difference(ours, words, "drift")["value"] == pytest.approx((0.4 + 0.0) / 2)


def test_an_lfd_is_compared_by_its_ratio():
    ours, theirs = ([run(v, c, metric="lfd_context") for v, c in zip(row, "abc", strict=True)]
                    for row in ([0.02, 0.03, 0.16], [0.01, 0.01, 0.02]))  # fmt: skip
    found, logs = difference(ours, theirs, "lfd_context"), [log(2), log(3), log(8)]
    low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert (found["scale"], found["value"]) == ("ratio", pytest.approx(exp(np.mean(logs))))
    assert (found["low"], found["high"]) == pytest.approx((exp(low), exp(high)))
    zero = [run(0.0, name, metric="lfd_context") for name in "abc"]
    assert difference(ours, zero, "lfd_context")["scale"] == "difference"


def test_what_tells_no_error_is_not_tested():
    assert difference([run(1.0)], [run(2.0, "dog")], "drift") is None
    assert difference([run(1.0)], [run(None)], "drift") is None
    one = difference([run(2.0), run(3.0, seed=1)], [run(1.0), run(1.0, seed=1)], "drift")  # a single concept
    same = difference([run(0.9), run(0.6, "dog")], [run(1.0), run(0.7, "dog")], "drift")  # by the very same
    zero = difference([run(0.0), run(0.0, "dog")], [run(0.0), run(0.0, "dog")], "drift")
    assert [found["value"] for found in (one, same, zero)] == pytest.approx([1.5, -0.1, 0.0])
    assert {found[name] for found in (one, same, zero) for name in ("low", "high", "p")} == {None}
    edge = [[run(v, c, metric="noun") for v, c in zip(row, "abc", strict=True)] for row in ([1, 1, 0.97], [1, 0.98, 1])]
    assert difference(*edge, "noun")["p"] is None and not beyond(difference(*edge, "noun"))


def test_holm_s_step_down():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm 1979
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_the_primary_endpoints_are_corrected_together_and_the_rest_is_not():
    first, words, lora = groups_of(study(infusion=0.4, words=0.3, lora=0.41))
    assert not any("difference" in one for one in first.figures.values())
    tested = [words.figures["clip_i"], lora.figures["clip_i"], lora.figures["lfd_context"]]
    ps = [one["difference"]["p"] for one in tested]
    assert [one["difference"]["p_holm"] for one in tested] == pytest.approx(holm(ps)) and max(ps) < 0.01
    assert all(one["difference"]["primary"] for one in tested)
    other = lora.figures["drift"]["difference"]
    assert not other["primary"] and "p_holm" not in other
    assert lora.figures["clip_i"]["words"]["value"] == pytest.approx(0.11)
    assert first.figures["clip_i"]["words"]["low"] > 0 and "words" not in words.figures["clip_i"]


def test_groups_are_in_the_order_of_their_first():
    runs = [run(0.1, group="b"), run(0.4, group="lora"), run(0.2, "dog", group="b"), run(0.8, "dog", group="lora")]
    first, second = groups_of(runs)
    assert (first.name, second.name) == ("b", "lora") and first.concepts == ["cat", "dog"]
    assert first.label == "b" and groups_of(runs[:1])[0].label == runs[0]["label"]  # no group of more than one
    assert groups_of([]) == [] and first.kind == "concept"
    mixed = groups_of([run(0.0, anchored=True), run(0.0, "dog"), run(0.0, group="b", anchored=True)])
    assert [group.anchored for group in mixed] == [False, True]


@pytest.mark.parametrize("title", ["likeness", "LFD", "LFD, gamma", "shares of 95 % and 80 %"])
def test_intervals_hold_the_truth_as_often_as_they_say(title):
    """800 experiments know a share of 95 % to 0.8 points; the whole simulation is `python -m scripts.coverage`."""
    found = coverage(*CASES[title], concepts=5, experiments=800)
    assert 0.93 <= found["covered"] <= 0.97 and found["given"] > 0.99


def test_a_difference_of_lfds_would_hold_it_too_seldom():
    assert coverage(*CASES["LFD, not as a ratio"], concepts=5, experiments=800)["covered"] < 0.93
