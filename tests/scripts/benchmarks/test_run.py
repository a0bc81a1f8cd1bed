from contextlib import contextmanager

import pytest
import torch
from torch import nn

from ldm.util.cli import UserError
from scripts.benchmarks import run, timing
from scripts.benchmarks.cases import guided_steps, train_steps
from scripts.benchmarks.run import GROUPS, absolute, benchmark, graphs, measure, ratios
from scripts.benchmarks.settings import MEANS, MEMORY, RATIOS, RATIOS_OF_MEANS, TIMED, Settings, choose
from scripts.benchmarks.table import columns, table
from scripts.benchmarks.timing import Case

SETTINGS = Settings(size="pocket", latent=8, batch=2, repeats=3)


@pytest.fixture(scope="module")
def result() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.PEAK_SIDE, "cpu", 128)
        patch.setattr(run, "peak", lambda name, settings: dict(peak_bytes=3, loaded_bytes=2, above_loaded_bytes=1))
        return benchmark(SETTINGS, choose(["guided_step_with_concept_vs_base", "unet", "memory_image"]), "typed")


def test_what_is_measured(result):
    cases = ["guided_step_base", "guided_step_one_concept", "unet"]
    assert list(result["times"]) == list(result["flops"]) == list(result["utilisation"]) == cases
    assert result["command"] == "typed" and result["settings"]["cases"] == ["memory_image", *cases]
    assert result["settings"]["latent"] == 8 and result["settings"]["precision"] == "full"
    assert result["device"]["torch"] == torch.__version__ and result["device"]["dtype"] == "float32"
    assert result["device"]["threads"] == torch.get_num_threads() and result["device"]["name"]
    assert all(
        time["n"] == 3 and 0 < time["q1_s"] <= time["median_s"] <= time["q3_s"] for time in result["times"].values()
    )
    assert result["memory"]["peaks"] == {"memory_image": {"peak_bytes": 3, "loaded_bytes": 2, "above_loaded_bytes": 1}}
    assert "VmHWM" in result["memory"]["how"] and "128 × 128" in result["peak"]["how"]


def test_utilisation_is_of_the_peak(result):
    for name, share in result["utilisation"].items():
        busy = result["flops"][name] / result["times"][name]["median_s"]
        assert share * result["peak"]["flops_per_s"] == pytest.approx(busy)
    assert result["flops"]["unet"] * 2 == result["flops"]["guided_step_base"]  # guidance has two rows for each image


def test_only_ratios_with_both_sides_are_there(result):
    (name,) = result["ratios"]
    found, times = result["ratios"][name], result["times"]
    assert name == "guided_step_with_concept_vs_base" and found["n"] == 3
    assert found["value"] == times["guided_step_one_concept"]["median_s"] / times["guided_step_base"]["median_s"]
    assert 1.3 < found["flops"] < 1.6  # three rows instead of two, of which one has no cross-attention of its own
    assert result["agreement"].keys() == {"unet_vs_diffusers"} and result["absolute"] == {} == result["compile"]


def test_ratios_have_their_sides_the_right_way_round():
    seconds = {name: [1.0 + i] for i, name in enumerate(TIMED)}
    found = ratios(seconds, {name: 10 + i for i, name in enumerate(TIMED)})
    assert found.keys() == RATIOS.keys()
    assert found["train_step_vs_released_design"]["value"] == pytest.approx(6 / 7)
    assert found["guided_step_with_8_concepts_vs_base"]["value"] == 3
    assert found["unet_vs_diffusers"]["flops"] == pytest.approx(13 / 14)


def test_an_image_is_a_share_of_its_batch():
    times = {"image_50_steps": {"median_s": 9.0}, "optimiser_10_steps": {"median_s": 5.0}, "unet": {"median_s": 1.0}}
    assert absolute(times, SETTINGS) == {"image_50_steps_s": 4.5, "optimiser_10_steps_s": 5.0}


def test_the_table_has_a_line_for_each(result):
    text = table(result | {"absolute": {"image_50_steps_s": 65.4321}})
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines() if line}
    for name in (*result["times"], *result["ratios"]):
        assert lines[name][0] == name
    assert lines["unet"][-1] == f"{result['utilisation']['unet']:.0%}"
    assert lines["image_50_steps_s"][1:] == ["65.4", "s"]
    assert (
        lines["guided_step_with_concept_vs_base"][-1]
        == f"{result['ratios'][lines['guided_step_with_concept_vs_base'][0]]['flops']:.3f}"
    )
    assert columns([("a", "bcd"), ("efgh", "i")]) == ["a     bcd", "efgh    i"]


def test_choosing():
    assert choose(None) == [*MEMORY, *TIMED] and tuple(sum(GROUPS, ())) == (*TIMED, *MEANS)
    assert choose(["unet", "memory_image"]) == ["memory_image", "unet"]
    assert choose(["means"]) == list(MEANS) and len(RATIOS_OF_MEANS) == len(MEANS) - 2
    assert choose(["unet_vs_diffusers", "unet"], compiled=True) == ["unet", "unet_diffusers"]
    with pytest.raises(UserError, match="--only: there is no case `unett`; did you mean `unet`?"):
        choose(["unett"])
    with pytest.raises(UserError, match="--compile: memory is measured without it"):
        choose(["memory_image"], compiled=True)


def compiled(function: nn.Module) -> Case:
    function.compile(backend="eager", dynamic=False)

    @contextmanager
    def ready():
        yield lambda steps: function(torch.ones(2))

    return Case("compiled", ready)


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()


def test_graphs_and_their_breaks_are_counted():
    torch._dynamo.reset()
    whole = graphs(compiled(nn.Tanh()))
    assert whole == {"graphs": 1, "graph_breaks": 0, "reasons": {}}
    broken = graphs(compiled(Broken()))
    assert broken["graphs"] == 2 and broken["graph_breaks"] == 1
    assert sum(broken["reasons"].values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("cases", [guided_steps, train_steps])
def test_every_unet_call_is_one_graph_and_none_is_compiled_while_timed(sd, cases):
    """Making a case ready puts its edits into the UNet anew; the cases of a group share the UNet."""
    sd.unet.compile(backend="eager", dynamic=False)
    settings, told = Settings(latent=8, compile=True, repeats=2), []
    cases = cases(sd, settings)
    seconds, flops, found = measure(cases, settings, told.append)
    names = [case.name for case in cases]
    assert list(seconds) == list(flops) == list(found) == names and told == names * 3
    for entry in found.values():
        assert entry["graph_breaks"] == entry["graphs_compiled_while_timed"] == 0 and entry["reasons"] == {}
        assert 1 <= entry["graphs"] <= 2  # the foundation stream and the customised one, where they are two calls
