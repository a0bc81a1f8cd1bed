from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ldm.config import ROOT, ConfigError, build, check, check_params, find, load_config, refuse_unused, resolve


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def linear(**params: object) -> dict:
    return {"target": "torch.nn.Linear", "params": params}


def test_later_files_win_over_earlier_ones_and_over_what_they_include(tmp_path):
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts", one="a: 1\nb: 1\nc: {x: 1, y: 1}\n", two="b: 2\nc: {y: 2}\ninclude: one.yaml\n")
    write(tmp_path, top="include: [parts/two.yaml]\nc: {z: 3}\n", last="a: 4\n")
    config = load_config([tmp_path / "top.yaml", tmp_path / "last.yaml"], defaults={"a": 0, "d": 9})
    assert config == {"a": 4, "b": 2, "c": {"x": 1, "y": 2, "z": 3}, "d": 9}


def test_a_value_left_open_does_not_hide_one_that_is_set(tmp_path):
    write(tmp_path, one="word: cat\n", two="include: one.yaml\nword: ???\n")
    assert load_config(tmp_path / "two.yaml").word == "cat"


def test_an_override_fills_what_a_file_leaves_open(tmp_path):
    (tmp_path / "a.yaml").write_text("superclass: ???\nplace: in the ${superclass}")
    config = load_config(tmp_path / "a.yaml", ["superclass=cat"])
    assert config.superclass == "cat" and config.place == "in the cat"


def test_overrides_are_typed_and_reach_into_mappings_and_lists(tmp_path):
    write(tmp_path, a="x: 1\nnode: {list: [1, 2], word: a}\nlink: ${x}\n")
    overrides = ["x=1e-3", "node.list[1]=7", "node.word=b c", "node.new={k: null}", "node.flag=true"]
    config = load_config(tmp_path / "a.yaml", overrides)
    assert config.x == config.link == 0.001
    assert config.node == {"list": [1, 7], "word": "b c", "new": {"k": None}, "flag": True}


@pytest.mark.parametrize(
    ("files", "overrides", "message"),
    [
        ({}, [], "a.yaml: no such config file"),
        ({"a": "include: b.yaml"}, [], "b.yaml: no such config file .included by .*a.yaml"),
        ({"a": "include: b.yaml", "b": "include: a.yaml"}, [], "includes itself, by way of .*b.yaml"),
        ({"a": "x: [1"}, [], "a.yaml: not a readable YAML file"),
        ({"a": "- 1"}, [], "a.yaml: a config is a mapping"),
        ({"a": "alpha: 1"}, ["alpa=2"], "`alpa=2`: the config has no key `alpa`; did you mean `alpha`"),
        ({"a": "alpha: 1"}, ["alpha"], "write it as key=value"),
        ({"a": "alpha: 1"}, ["alpha=[1"], "alpha"),
    ],
)
def test_mistakes_in_files_and_overrides(tmp_path, files, overrides, message):
    write(tmp_path, **files)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "a.yaml", overrides)


def test_keys_that_nothing_refers_to_are_refused():
    config = OmegaConf.create({"model": "${sd.params}", "sd": {"params": 1}, "word": 2, "list": ["x ${word}"]})
    refuse_unused(config, ["model", "list"])
    with pytest.raises(ConfigError, match="unknown key `wrod`.*did you mean `word`"):
        refuse_unused(OmegaConf.merge(config, {"wrod": 1}), ["model", "list"])


def test_resolving_names_what_leads_nowhere():
    assert resolve(OmegaConf.create({"a": 1, "b": "${a}"})) == {"a": 1, "b": 1}
    with pytest.raises(ConfigError, match="^b: "):
        resolve(OmegaConf.create({"b": "${a}"}))
    with pytest.raises(ConfigError, match="^b: "):
        resolve(OmegaConf.create({"b": "???"}))


def test_children_are_built_first_and_handed_over():
    node = {"target": "torch.nn.TransformerEncoder", "params": {"num_layers": 2}}
    node["params"]["encoder_layer"] = {
        "target": "torch.nn.TransformerEncoderLayer",
        "params": {"d_model": 8, "nhead": 2},
    }
    built = build(OmegaConf.create({"nets": [node, linear(in_features=2, out_features=3)], "n": 1}))
    assert len(built["nets"][0].layers) == 2
    assert built["nets"][0].layers[0].self_attn.num_heads == 2
    assert built["nets"][1].weight.shape == (3, 2)
    assert built["n"] == 1


def test_given_objects_take_the_place_of_a_nodes_own():
    layer = torch.nn.Linear(2, 3)
    node = {
        "target": "torch.optim.lr_scheduler.StepLR",
        "params": {"optimizer": {"target": "torch.nn.ReLU"}, "step_size": 2},
    }
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    assert build(node, given={"optimizer": optimizer}).optimizer is optimizer


def test_a_node_builds_on_the_meta_device():
    with torch.device("meta"):
        assert build(linear(in_features=2, out_features=3)).weight.is_meta


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (linear(in_feature=2, out_features=3), "^top.params.in_feature: Linear has no .*did you mean `in_features`"),
        (linear(in_features=2), "^top.params: Linear also needs `out_features`"),
        ({**linear(in_features=2, out_features=3), "name": 1}, "^top.name: a node has the keys"),
        (linear(in_features=2, out_features="3"), "^top.params.out_features: Linear wants int here, not '3'"),
        (linear(in_features=2, out_features=True), "^top.params.out_features: Linear wants int"),
        (linear(in_features=2, out_features=3, bias=1), "^top.params.bias: Linear wants bool here, not 1"),
        ({"target": "torch.nn.Linaer"}, "^top.target: `torch.nn` has no class `Linaer`; did you mean `Linear`"),
        ({"target": "torch.nm.Linear"}, "^top.target: there is no module `torch.nm`"),
        ({"target": "os.system"}, "^top.target: `os.system` is not a class of ldm, "),
        ({"target": "torch.load", "params": {"f": "x"}}, "^top.target: `torch` has no class `load`"),
        ({"target": "ldm.config.Path"}, "^top.target: `ldm.config` has no class `Path`"),
        ({"target": 3}, "^top.target: `3` is not a class"),
        ({"target": "torch.nn.Linear", "params": [1]}, "^top.params: a mapping"),
    ],
)
def test_mistakes_are_named_by_their_path_before_anything_is_built(node, message):
    first = {"target": "torch.nn.Linear", "params": {"in_features": 2**40, "out_features": 2**40}}  # cannot be built
    with pytest.raises(ConfigError, match=message):
        check(node, "top")
    with pytest.raises(ConfigError, match=message.replace("^top", "^list.1")):
        build([first, node], "list")


def test_an_object_of_another_class_is_refused():
    node = {
        "target": "ldm.pipeline.StableDiffusion",
        "params": dict.fromkeys(("unet", "vae", "text", "schedule"), {"target": "torch.nn.ReLU"}),
    }
    with pytest.raises(ConfigError, match="^params.unet: StableDiffusion does not take a ReLU here"):
        build(node)


class Annotated:
    def __init__(
        self,
        rate: float = 0.1,
        size: int | None = None,
        sides: tuple[int, ...] = (),
        where: str | Path = "",
        thing: Any = None,
        free=None,
    ):
        pass


@pytest.mark.parametrize(
    "params",
    [
        {"rate": 1},
        {"size": None},
        {"size": 3},
        {"sides": [1, 2]},
        {"where": "a/b"},
        {"thing": True},
        {"thing": {"a": 1}},
        {"free": "x"},
        {},
    ],
)
def test_values_that_agree_with_their_annotation(params):
    check_params(Annotated, params, "node")


@pytest.mark.parametrize(
    "params", [{"rate": "1"}, {"size": 1.5}, {"sides": [1, "b"]}, {"sides": 1}, {"where": 3}, {"rate": None}]
)
def test_values_that_do_not_agree_with_their_annotation(params):
    with pytest.raises(ConfigError, match=f"^node.{next(iter(params))}: Annotated wants "):
        check_params(Annotated, params, "node")


class OpenEnded:
    def __init__(self, **extra: object):
        pass


def test_an_open_ended_constructor_takes_any_name():
    check_params(OpenEnded, {"anything": 1}, "node")


def test_files_are_found_here_or_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("configs/backbone") == ROOT / "configs" / "backbone"
    (tmp_path / "configs" / "backbone").mkdir(parents=True)
    assert find("configs/backbone") == Path("configs/backbone")
    assert find("nowhere") == Path("nowhere")
