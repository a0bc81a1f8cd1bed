from infusion.methods import method_names
from infusion.metrics.report.aggregate import groups_of
from infusion.metrics.report.plots import PLOTS, colours, plots
from tests.infusion.metrics.report.test_page import many, result


def test_a_method_keeps_its_colour_and_no_two_names_share_one():
    methods, some = colours(method_names()), colours(["hard gate", "lora", *(f"ablation {i}" for i in range(10))])
    assert some["lora"] == methods["lora"]
    assert len(set(methods.values())) == len(methods) and len(set(some.values())) == len(some)


def test_plots_are_of_what_has_been_measured():
    assert set(plots(groups_of([result()]))) == {"tradeoff_lfd", "tradeoff_w2", "training_context", "timesteps_context"}
    bare = result(timesteps={}, training={})
    for name in ("clip_i", "clip_t"):
        del bare["figures"][name]
    assert plots(groups_of([bare])) == {}


def test_a_plane_names_its_groups_and_levels_and_is_the_same_each_time():
    results = [result("_one"), result("base <model>", "lora")]
    svg = plots(groups_of(results))["tradeoff_lfd"]
    for text in ("_one", "base &lt;model&gt;", "base model", "photos among themselves", "LFD, around the concept"):
        assert f"{text}</text>" in svg
    assert svg == plots(groups_of(results))["tradeoff_lfd"]


def test_a_curve_is_of_a_group_and_shows_zero():
    drawn = plots(groups_of(many()))
    assert set(drawn) <= set(PLOTS) and drawn["training_context"].count("way 3</text>") == 1
    assert any(f">{zero}</text>" in drawn["training_context"] for zero in ("0", "0.0", "0.00", "0.000"))
