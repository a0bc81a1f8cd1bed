import math
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ldm.models.tokenizer import Tokenizer
from ldm.util.config import (
    ROOT,
    ConfigError,
    check,
    check_params,
    files_in,
    find,
    instantiate,
    load_config,
    refuse_unused,
    resolve,
)


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


@pytest.mark.parametrize("text", ["a: ${a}", "a: ${b}\nb: ${a}", "a: {x: {y: '${a}'}}", "a: {x: '${b.y}'}\nb: ${a}\n"])
def test_references_without_an_end(tmp_path, text):
    write(tmp_path, a=text)
    with pytest.raises(ConfigError, match="^a|^b|^config"):
        resolve(load_config(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system", "!Dog {}"]
)
def test_yaml_holds_no_python(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, a=f"alpha: {text}", b="alpha: 1")
    with pytest.raises(ConfigError, match="a.yaml: not a readable YAML file"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="override `alpha=!"):
        load_config(tmp_path / "b.yaml", [f"alpha={text}"])
    assert not Path("ran").exists()


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
    built = instantiate(OmegaConf.create({"nets": [node, geglu(dim=2, inner=3)], "data": data, "n": 1}))
    assert built["nets"][0].count == 3
    assert built["nets"][1].proj.weight.shape == (6, 2)
    assert built["data"].parts == ("vae",)
    assert built["n"] == 1


def test_a_child_is_handed_to_its_parent_as_an_object():
    tokenizer = {"target": "ldm.models.tokenizer.Tokenizer", "params": {"merges": 10, "context_length": 8}}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "layers": 1, "heads": 2, "max_length": 8}
    node = {"target": "ldm.models.text.ClipText", "params": {"tokenizer": tokenizer, **sizes}}
    assert instantiate(node).tokenizer.context_length == 8


def test_given_objects_take_the_place_of_a_nodes_own():
    tokenizer = Tokenizer(merges=10, context_length=8)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "layers": 1, "heads": 2, "max_length": 8}
    node = {"target": "ldm.models.text.ClipText", "params": {"tokenizer": geglu(dim=2, inner=3), **sizes}}
    assert instantiate(node, given={"tokenizer": tokenizer}).tokenizer is tokenizer


def test_a_node_builds_on_the_meta_device():
    with torch.device("meta"):
        assert instantiate(geglu(dim=2, inner=3)).proj.weight.is_meta


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (geglu(dm=2, inner=3), "^top.params.dm: GEGLU has no .*did you mean `dim`"),
        (geglu(dim=2), "^top.params: GEGLU also needs `inner`"),
        ({**geglu(dim=2, inner=3), "name": 1}, "^top.name: a node has the keys"),
        (geglu(dim=2, inner="3"), "^top.params.inner: GEGLU wants int here, not '3'"),
        (geglu(dim=2, inner=True), "^top.params.inner: GEGLU wants int"),
        ({"target": "infusion.gate.Gate", "params": {"tau": "a"}}, "^top.params.tau: Gate wants float here, not 'a'"),
        (
            {"target": "ldm.models.attention.GEGUL"},
            "^top.target: `ldm.models.attention` has no class `GEGUL`; did you mean `GEGLU`",
        ),
        ({"target": "ldm.attentoin.GEGLU"}, "^top.target: there is no module `ldm.attentoin`"),
        ({"target": "os.system"}, "^top.target: `os.system` is not a class of ldm, "),
        ({"target": "torch.nn.Linear"}, "^top.target: `torch.nn.Linear` is not a class of ldm, "),
        ({"target": "pytorch_lightning.Trainer"}, "^top.target: `pytorch_lightning.Trainer` is not a class of ldm, "),
        ({"target": "transformers.AutoModel"}, "^top.target: `transformers.AutoModel` is not a class of ldm, "),
        ({"target": "ldm.util.config.load_config"}, "^top.target: `ldm.util.config` has no class `load_config`"),
        ({"target": "ldm.util.config.Path"}, "^top.target: `ldm.util.config` has no class `Path`"),
        ({"target": "ldm.models.attention.nn"}, "^top.target: `ldm.models.attention` has no class `nn`"),
        ({"target": "ldm.models.attention.__builtins__"}, "^top.target: `ldm.models.attention` has no class"),
        ({"target": "ldm"}, "^top.target: `ldm` is not a class of ldm, "),
        ({"target": "ldm."}, "^top.target: `ldm.` is not a class of ldm, "),
        ({"target": 3}, "^top.target: `3` is not a class"),
        (
            {"target": "ldm.pipeline.StableDiffusion.from_confg"},
            "^top.target: `ldm.pipeline.StableDiffusion` has no class method `from_confg`; did you mean `from_config`",
        ),
        ({"target": "ldm.pipeline.StableDiffusion.load"}, "^top.target: .* has no class method `load`"),
        ({"target": "ldm.pipeline.Path.cwd"}, "^top.target: `ldm.pipeline` has no class `Path`"),
        (
            {"target": "ldm.pipeline.StableDiffusion.from_checkpoint", "params": {"config_path": "a", "use_ema": 3}},
            "^top.params.use_ema: StableDiffusion.from_checkpoint wants bool . None here, not 3",
        ),
        ({"target": "ldm.models.attention.GEGLU", "params": [1]}, "^top.params: a mapping"),
    ],
)
def test_mistakes_are_named_by_their_path_before_anything_is_built(node, message):
    first = geglu(dim=2**40, inner=2**40)  # cannot be built
    with pytest.raises(ConfigError, match=message):
        check(node, "top")
    with pytest.raises(ConfigError, match=message.replace("^top", "^list.1")):
        instantiate([first, node], "list")


def test_an_object_of_another_class_is_refused():
    parts = dict.fromkeys(("unet", "vae", "text", "schedule"), geglu(dim=1, inner=1))
    with pytest.raises(ConfigError, match="^params.unet: StableDiffusion does not take a GEGLU here"):
        instantiate({"target": "ldm.pipeline.StableDiffusion", "params": parts})


def test_what_a_class_refuses_is_named_by_its_path():
    node = {"target": "infusion.gate.Gate", "params": {"tau": 0.0}}
    with pytest.raises(ConfigError, match="^top.params: tau: the gate's tau must be above 0"):
        instantiate(node, "top")


def test_a_bug_of_a_class_stays_what_it_is():
    with pytest.raises(RuntimeError, match="negative dimension"):
        instantiate(geglu(dim=-1, inner=3), "top")


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
    "params",
    [{"rate": "1"}, {"size": 1.5}, {"sides": [1, "b"]}, {"sides": 1}, {"where": 3}, {"rate": None}, {"rate": math.nan}],
)
def test_values_that_do_not_agree_with_their_annotation(params):
    with pytest.raises(ConfigError, match=f"^node.{next(iter(params))}: Annotated wants "):
        check_params(Annotated, params, "node")


def test_files_are_found_here_or_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("configs/backbone") == ROOT / "configs" / "backbone"
    (tmp_path / "configs" / "backbone").mkdir(parents=True)
    assert find("configs/backbone") == Path("configs/backbone")
    assert find("nowhere") == Path("nowhere")


TYPED = """
target_of: {target: ldm.pipeline.StableDiffusion, params: {name: "${name}", checkpoint: "${file}", image_size: 8}}
name: ???
file: usual.ckpt
alias: ${name}
long: in the ${place}
place: house
steps: 1
list: [1, 2]
node: {target: data.prior.ClassImages, params: {prompt: "${prompt}", root: "${root}", count: "${steps}"}}
prompt: a {}
root: null
photos: {target: data.many.ConceptEntry, params: {name: a, superclass: dog, data_root: a}}
trained: {target: infusion.training.callbacks.ConceptSamples, params: {prompts: [a, b]}}
gate: {target: infusion.gate.Gate, params: {kind: hard, tau: "${free}"}}
free: 0.1
parts: {}
ckpt: null
"""
AS_IT_STANDS = ("123", "true", "no", "[dog]", "dog: mine", "*", "~", "'a'", "a #b", "0x10", "1e3", "!x", "&x", "- a")
TEXTS = ("name", "prompt", "root", "file", "place", "photos.params.data_root", "trained.params.prompts[1]",
         "node.params.root", "parts.vae", "ckpt")  # fmt: skip


@pytest.mark.parametrize("key", TEXTS)
def test_what_is_for_texts_is_taken_as_it_stands(tmp_path, key):
    from ldm.training.config import Training

    write(tmp_path, a=TYPED)
    for text in AS_IT_STANDS:
        config = load_config(tmp_path / "a.yaml", [f"{key}={text}"], keys=Training)
        assert OmegaConf.select(config, key) == text


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("steps=3", 3),
        ("free=0.3", 0.3),
        ("list=[3]", [3]),
        ("list=null", None),
        ("root=null", None),
        ("file=null", None),
        ("ckpt=", None),
        ("name=null", "null"),
        ("name=", ""),
        ("name=${place}", "house"),
        ("trained.params.prompts=[c]", ["c"]),
        ("parts={vae: a.ckpt}", {"vae": "a.ckpt"}),
    ],
)
def test_what_is_for_other_values_is_read_as_yaml(tmp_path, word, value):
    from ldm.training.config import Training

    write(tmp_path, a=TYPED)
    key = word.partition("=")[0]
    assert OmegaConf.select(load_config(tmp_path / "a.yaml", [word], keys=Training), key) == value


def test_home_is_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert find("~/photos") == tmp_path / "photos"
    assert find("~") == tmp_path and find("~nobody-of-this-name") == Path("~nobody-of-this-name")
    (tmp_path / "~").mkdir()
    assert find("~") == Path("~")  # what is there goes first


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a.pt", ["a.pt"]),
        ("a.pt, b.pt", ["a.pt", "b.pt"]),
        ("cat, old.pt", ["cat, old.pt"]),
        ("a.pt,cat, old.pt,b.pt", ["a.pt", "cat, old.pt", "b.pt"]),
        ("cat, new.pt", ["cat", "new.pt"]),
        ("", []),
    ],
)
def test_a_name_of_a_file_may_have_commas(tmp_path, monkeypatch, text, names):
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt", "cat, old.pt"):
        (tmp_path / name).touch()
    assert files_in(text) == names


@pytest.mark.parametrize("text", [",", "a,,b", "a,"])
def test_a_list_of_files_has_no_gaps(text):
    with pytest.raises(ArgumentTypeError, match="is not a file or folder"):
        files_in(text)
