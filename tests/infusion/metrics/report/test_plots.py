from infusion.metrics.report.aggregate import groups_of
from infusion.metrics.report.plots import PLOTS, looks, plots
from tests.infusion.metrics.report.conftest import described, result, study


def test_no_two_groups_look_the_same():
    groups = groups_of([result(f"{i}", f"way {i}") for i in range(20)])
    assert len({(look["color"], look["marker"]) for look in looks(groups).values()}) == 20
    assert len({look["color"] for look in looks(groups).values()}) == 20


def test_plots_are_of_what_has_been_measured():
    drawn = plots(groups_of([result()]))
    assert set(drawn) == {"tradeoff_lfd", "tradeoff_w2", "training_context"} <= set(PLOTS)
    bare = result(training={})
    del bare["figures"]["clip_i"]
    assert plots(groups_of([bare])) == {}


def test_a_plane_names_its_groups_and_says_what_is_better_and_is_the_same_each_time():
    results = [result("_one"), result("base <model>", "lora"), described()]
    svg = plots(groups_of(results))["tradeoff_lfd"]
    for text in ("_one", "base &lt;model&gt;", "base model", "words", "LFD, around the concept, lower is better"):
        assert f"{text}</text>" in svg
    assert svg == plots(groups_of(results))["tradeoff_lfd"]


def test_rivals_stay_apart_beside_one_that_is_far_off():
    """On a logarithmic axis doubling is the same step everywhere."""
    svg = plots(groups_of(study(a=0.4, b=0.4, c=0.4, d=0.4)))["tradeoff_lfd"]
    assert all(f">{tick}</text>" in svg for tick in ("0.01", "0.02", "0.05"))


def test_curves_run_over_samples_seen_where_all_are_known():
    runs = [result(training_samples=1600, best_step=100), result("hat", "lora", training_samples=3200), described()]
    svg = plots(groups_of(runs))["training_context"]
    assert ">samples seen in training</text>" in svg and ">3000</text>" in svg  # 200 steps of 16
    runs[0]["training_samples"] = None
    assert ">training step</text>" in plots(groups_of(runs))["training_context"]
