from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ldm.models.tokenizer import Tokenizer
from ldm.util.config import ROOT, ConfigError, build, check, check_params, find, load_config, refuse_unused, resolve


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def geglu(**params: object) -> dict:
    return {"target": "ldm.models.attention.GEGLU", "params": params}


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alpha=${oc.env:HOME}", "stands for another key"),
        ("alpha=${oc.decode:x}", "stands for another key"),
        ("alpha=!!python/object/apply:os.system [ls]", "has a tag"),
        ("alpha=" + "[" * 5000, "within each other"),
        ("alpha=" + "9" * 5000, "not a readable YAML file"),
        ("alpha=.nan", "a number is not finite"),
        ("alpha=${alpha}", "alpha: stands for itself"),
        ("alpha.b..c=1", "is no key"),
        ("alpha[=1", "is no key"),
        ("alpha." + "b." * 300 + "c=1", "is no key"),
        ("alpha.b.=1", "is no key"),
        ("__class__=1", "is no key|has no key"),
    ],
)
def test_overrides_are_plain_values_too(tmp_path, override, message):
    write(tmp_path, a="alpha: 1\n")
    with pytest.raises(ConfigError, match=message) as raised:
        load_config(tmp_path / "a.yaml", [override])
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


def test_no_resolver_runs_in_what_is_put_together_of_others(tmp_path, monkeypatch):
    """ "$" and "{oc.env:SECRET}", joined by a reference, are a resolver once more when the config is read again."""
    monkeypatch.setenv("SECRET", "hunter2")
    for name, text in {
        "joined": 'd: "$"\na: "${d}{oc.env:SECRET}"\n',
        "escaped": "d: 1\na: '\\${d}'\n",
    }.items():
        write(tmp_path, **{name: text})
        with pytest.raises(ConfigError, match=r"^a: `\$\{` is left"):
            resolve(load_config(tmp_path / f"{name}.yaml"))
    with pytest.raises(ConfigError, match=r"^node.a: `\$\{` is left"):
        build(OmegaConf.create({"d": "$", "a": r"\${oc.env:SECRET}"}))


@pytest.mark.parametrize("text", ["a: ${a}", "a: ${b}\nb: ${a}", "a: {x: {y: '${a}'}}", "a: {x: '${b.y}'}\nb: ${a}\n"])
def test_references_without_an_end(tmp_path, text):
    write(tmp_path, a=text)
    config = load_config(tmp_path / "a.yaml") if "b.y" in text else None  # which leads nowhere
    with pytest.raises(ConfigError, match="stands for itself|^a.x: "):
        resolve(config or load_config(tmp_path / "a.yaml"))


def test_references_that_double_each_other(tmp_path):
    texts = [f'a{i}: "${{a{i - 1}}}${{a{i - 1}}}"' for i in range(1, 40)]
    write(tmp_path, a="a0: x\n" + "\n".join(texts))
    with pytest.raises(ConfigError, match="a.yaml: a.*becomes too much"):
        load_config(tmp_path / "a.yaml")


def test_merging_into_references_that_double_each_other(tmp_path):
    """OmegaConf puts a copy where a mapping is merged into a reference."""
    one = ["a0: {z: 1}"] + [f"a{i}: {{x: '${{a{i - 1}}}', y: '${{a{i - 1}}}'}}" for i in range(1, 30)]
    two = [f"a{i}: {{x: {{}}, y: {{}}}}" for i in range(1, 30)]
    write(tmp_path, one="\n".join(one), two="\n".join(two))
    with pytest.raises(ConfigError, match="one.yaml: a.*becomes too much"):
        load_config([tmp_path / "one.yaml", tmp_path / "two.yaml"])


def test_files_that_do_not_fit_together(tmp_path):
    write(tmp_path, one="a: [1]\n", two="a: {b: 1}\n")
    with pytest.raises(ConfigError, match="two.yaml: Cannot merge"):
        load_config([tmp_path / "one.yaml", tmp_path / "two.yaml"])


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
    node = {"target": "data.prior.ClassImages", "params": {"prompt": "a cat", "count": 3}}
    data = {"target": "ldm.training.callbacks.Offload", "params": {"parts": ["vae"]}}
    built = build(OmegaConf.create({"nets": [node, geglu(dim=2, inner=3)], "data": data, "n": 1}))
    assert built["nets"][0].count == 3
    assert built["nets"][1].proj.weight.shape == (6, 2)
    assert built["data"].parts == ("vae",)
    assert built["n"] == 1


def test_a_child_is_handed_to_its_parent_as_an_object():
    tokenizer = {"target": "ldm.models.tokenizer.Tokenizer", "params": {"merges": 10, "context_length": 8}}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "layers": 1, "heads": 2, "max_length": 8}
    node = {"target": "ldm.models.text.ClipText", "params": {"tokenizer": tokenizer, **sizes}}
    assert build(node).tokenizer.context_length == 8


def test_given_objects_take_the_place_of_a_nodes_own():
    tokenizer = Tokenizer(merges=10, context_length=8)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "layers": 1, "heads": 2, "max_length": 8}
    node = {"target": "ldm.models.text.ClipText", "params": {"tokenizer": geglu(dim=2, inner=3), **sizes}}
    assert build(node, given={"tokenizer": tokenizer}).tokenizer is tokenizer


def test_a_node_builds_on_the_meta_device():
    with torch.device("meta"):
        assert build(geglu(dim=2, inner=3)).proj.weight.is_meta


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (geglu(**{"x" * 5000: 1}), "^top.params.x{100}: GEGLU has no parameter `x{100}`"),
        (geglu(dm=2, inner=3), "^top.params.dm: GEGLU has no .*did you mean `dim`"),
        (geglu(dim=2), "^top.params: GEGLU also needs `inner`"),
        ({**geglu(dim=2, inner=3), "name": 1}, "^top.name: a node has the keys"),
        (geglu(dim=2, inner="3"), "^top.params.inner: GEGLU wants int here, not '3'"),
        (geglu(dim=2, inner=True), "^top.params.inner: GEGLU wants int"),
        (geglu(dim=2, inner="x" * 999), "^top.params.inner: GEGLU wants int here, not 'x{76}…$"),
        ({"target": "infusion.gate.Gate", "params": {"tau": "a"}}, "^top.params.tau: Gate wants float here, not 'a'"),
        (
            {"target": "ldm.models.attention.GEGUL"},
            "^top.target: `ldm.models.attention` has no class `GEGUL`; did you mean `GEGLU`",
        ),
        ({"target": "ldm.attentoin.GEGLU"}, "^top.target: there is no module `ldm.attentoin`"),
        ({"target": "os.system"}, "^top.target: `os.system` is not a class of ldm, "),
        ({"target": "ldm.util.config.load_config"}, "^top.target: `ldm.util.config` has no class `load_config`"),
        ({"target": "ldm.util.config.Path"}, "^top.target: `ldm.util.config` has no class `Path`"),
        ({"target": 3}, "^top.target: `3` is not a class"),
        ({"target": "ldm.models.attention.GEGLU", "params": [1]}, "^top.params: a mapping"),
    ],
)
def test_mistakes_are_named_by_their_path_before_anything_is_built(node, message):
    first = geglu(dim=2**40, inner=2**40)  # cannot be built
    with pytest.raises(ConfigError, match=message):
        check(node, "top")
    with pytest.raises(ConfigError, match=message.replace("^top", "^list.1")):
        build([first, node], "list")


def test_an_object_of_another_class_is_refused():
    parts = dict.fromkeys(("unet", "vae", "text", "schedule"), geglu(dim=1, inner=1))
    with pytest.raises(ConfigError, match="^params.unet: StableDiffusion does not take a GEGLU here"):
        build({"target": "ldm.pipeline.StableDiffusion", "params": parts})


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (geglu(dim=-1, inner=3), "^top.params: no GEGLU can be built of these .*negative dimension"),
        (
            {"target": "transformers.CLIPSegConfig", "params": {"text_config": {"hidden_size": "x"}}},
            "^top.params: no CLIPSegConfig can be built of these .*hidden_size",
        ),
    ],
)
def test_parameters_that_a_class_cannot_take_are_a_mistake_in_the_config(node, message):
    with pytest.raises(ValueError, match=message):
        build(node, "top")


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
