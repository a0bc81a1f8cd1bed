from math import sqrt

import pytest

from infusion.metrics.report.aggregate import concept_of, difference, figures_of, gather, groups_of


def figure(value, stderr=0.02, **more):
    return {"value": value, "stderr": stderr, "n": 4} | more


def run(value, concept="cat", seed=0, group="lora", **more):
    """A result of one metric."""
    figures = {} if value is None else {"drift": value if isinstance(value, dict) else figure(value)}
    said = {"label": f"{group} {concept} {seed} {more}", "group": group, "world_concept": concept, "photos": ""}
    return said | {"superclass": "thing", "training_seed": seed, "anchored": False, "figures": figures} | more


def test_a_concept_counts_once_however_many_runs_it_has():
    cats, dogs, owls = [run(1.0), run(2.0, seed=1), run(3.0, seed=2)], [run(4.0, "dog")], [run(9.0, "owl")]
    found = figures_of([*cats, *dogs, *owls])["drift"]  # means 2, 4, 9
    assert found == pytest.approx({"value": 5.0, "stderr": sqrt((9 + 1 + 16) / 2 / 3), "n": 5, "concepts": 3})


def test_one_concept_has_its_error_over_runs_and_one_run_its_own():
    found = figures_of([run(0.5), run(0.7, seed=1)])["drift"]
    assert found == pytest.approx({"value": 0.6, "stderr": 0.1, "n": 2, "concepts": 1})
    assert figures_of([run(0.5)])["drift"] == {"value": 0.5, "stderr": 0.02, "n": 1, "concepts": 1}
    assert figures_of([run(figure(0.5, None))])["drift"]["stderr"] is None


def test_the_same_figure_of_all_runs_keeps_its_own_error():
    runs = [run(figure(0.5, 0.03)), run(figure(0.5, 0.03), seed=1)]
    assert figures_of(runs)["drift"] == {"value": 0.5, "stderr": 0.03, "n": 2, "concepts": 1}
    rates = [("cat", figure(1.0, 0.3)), ("cat", figure(1.0, 0.3)), ("dog", figure(1.0, 0.4))]
    assert gather(rates) == pytest.approx({"value": 1.0, "stderr": 0.25, "n": 3, "concepts": 2})  # √(0.3² + 0.4²) / 2
    assert gather([("cat", figure(0.0, 0.0)), ("dog", figure(0.0, 0.0))])["stderr"] == 0
    assert gather([("cat", figure(0.5, None)), ("dog", figure(0.5))])["stderr"] is None


def test_what_a_figure_is_read_against_is_gathered_alike():
    runs = [run(figure(0.5, base=figure(0.1, 0.05), floor=figure(0.2))) for _ in range(3)]
    runs.append(run(figure(0.5, base=figure(0.3, 0.05)), "dog"))
    found = figures_of(runs)["drift"]
    assert found["base"] == pytest.approx({"value": 0.2, "stderr": 0.1, "n": 4, "concepts": 2})
    assert found["floor"] == {"value": 0.2, "stderr": 0.02, "n": 3, "concepts": 1} and "ceiling" not in found


def test_a_metric_that_some_lack_is_of_the_others():
    assert figures_of([run(None), run(0.5, "dog")])["drift"]["concepts"] == 1
    assert figures_of([run(None)]) == {}


def test_concepts_are_told_by_what_is_known():
    assert concept_of(run(0, "hat", photos="photos/cat")) == "hat"
    assert concept_of(run(0, "", photos="photos/cat/")) == concept_of(run(0, "", photos="photos/cat")) == "photos/cat"
    assert concept_of(run(0, "")) == "thing"


def test_a_difference_is_of_pairs_of_one_concept_and_seed():
    ours = [run(1.5), run(1.7, seed=1), run(2.0, "dog"), run(9.9, "owl"), run(9.9, seed=7)]
    theirs = [run(1.0), run(1.0, seed=1), run(1.0, "dog"), run(0.0, "owl", seed=3), run(0.0, "bee")]
    found = difference(ours, theirs, "drift")  # cat: 0.5 and 0.7, dog: 1.0
    reach = 12.7062 * 0.2  # Student's t of one degree of freedom
    expected = {"value": 0.8, "stderr": 0.2, "low": 0.8 - reach, "high": 0.8 + reach, "n": 3, "concepts": 2}
    assert found == pytest.approx(expected, rel=1e-4)
    back = difference(theirs, ours, "drift")
    assert (back["value"], back["low"]) == pytest.approx((-found["value"], -found["high"]))


def test_a_difference_of_one_concept_is_over_its_pairs():
    found = difference([run(2.0), run(3.0, seed=1), run(4.0, seed=2)], [run(1.0, seed=s) for s in range(3)], "drift")
    reach = 4.30265 * sqrt(1 / 3)  # two degrees of freedom
    assert (found["value"], found["low"], found["high"]) == pytest.approx((2.0, 2 - reach, 2 + reach), rel=1e-4)
    assert (found["n"], found["concepts"]) == (3, 1)


def test_runs_of_one_concept_and_seed_count_as_their_mean():
    found = difference([run(2.0), run(4.0)], [run(1.0), run(2.0), run(3.0)], "drift")
    assert found == {"value": 1.0, "stderr": None, "low": None, "high": None, "n": 1, "concepts": 1}


def test_what_tells_no_error_has_no_interval():
    assert difference([run(1.0)], [run(2.0, "dog")], "drift") is None
    assert difference([run(1.0)], [run(None)], "drift") is None
    steps = [run(1 - 0.1, "cat"), run(0.7 - 0.1, "dog")], [run(1.0, "cat"), run(0.7, "dog")]
    found = difference(*steps, "drift")  # both by one sample in ten
    assert found["value"] == pytest.approx(-0.1) and found["stderr"] is found["low"] is None
    zeros = difference([run(0.0), run(0.0, "dog")], [run(0.0), run(0.0, "dog")], "drift")
    assert (zeros["value"], zeros["stderr"], zeros["low"], zeros["high"]) == (0, 0, 0, 0)


def test_groups_are_in_the_order_of_their_first_and_held_against_the_first():
    runs = [run(0.1, group="b"), run(0.4, group="lora"), run(0.2, "dog", group="b"), run(0.8, "dog", group="lora")]
    first, second = groups_of(runs)
    assert (first.name, second.name) == ("b", "lora") and first.concepts == ["cat", "dog"]
    assert "difference" not in first.figures["drift"]
    assert second.figures["drift"]["difference"]["value"] == pytest.approx(0.45)
    assert first.label == "b"
    assert groups_of(runs[:1])[0].label == runs[0]["label"]  # no group of more than one
    assert groups_of([]) == []


def test_a_group_is_anchored_where_all_its_runs_are():
    mixed = groups_of([run(0.0, anchored=True), run(0.0, "dog"), run(0.0, group="b", anchored=True)])
    assert [group.anchored for group in mixed] == [False, True]
