"""Configs: files, overrides, targets and parameters."""

import ast
import contextlib
import inspect
import io
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from fuzz_guard import read
from fuzz_mutations import ODD_TEXT, ODD_VALUE, changed, mutated
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig

from ldm.util.config import check, load_config, refuse_unused, resolve
from ldm.util.targets import OTHERS, OWN, PLAIN, ROOT, UnknownTarget, find_class

SHIPPED = sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "data" / "dreambooth").glob("*.yaml")])
SECRET = "a-word-of-the-environment"
WORDS = ["- ", ": ", "\n  ", "${", "}", "&a ", "*a", "<<: ", "---\n", "a: ${oc.env:SECRET}\n", "!!python/name:os.x "]
SIGNS = st.sampled_from(
    list("{}[]:-?&*!|>%@`'\"#,\n ~<=$") + ["- ", ": ", "\n  ", "${", "}", "&a ", "*a", "<<: ", "---\n"]
)
YAML = st.lists(st.one_of(SIGNS, ODD_TEXT.map(lambda text: text[:200]), st.sampled_from("abc012")), max_size=40).map(
    "".join
)


def open_config(path: Path, *overrides: str) -> DictConfig | None:
    """As main.py reads one: files and overrides, references, targets and parameters."""

    def reader(path: Path) -> DictConfig:
        config = load_config(path, overrides, {"trainer": {}, "seed": 23})
        refuse_unused(config, config)
        config = resolve(config)
        check(config)
        return config

    config = read(reader, path)
    assert config is None or SECRET not in str(config)
    return config


@pytest.fixture(scope="module", autouse=True)
def secret() -> Iterator[None]:
    """A config that has this word has run a resolver."""
    os.environ["SECRET"] = SECRET
    yield
    del os.environ["SECRET"]


@given(text=YAML)
def test_any_text(folder, text):
    (folder / "any.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    open_config(folder / "any.yaml")


@given(content=st.binary(max_size=300))
def test_any_bytes(folder, content):
    (folder / "any.yaml").write_bytes(content)
    open_config(folder / "any.yaml")


@given(value=ODD_VALUE)
def test_any_values(folder, value):
    (folder / "any.yaml").write_text(dumped({"trainer": value, "x": "${trainer}", "y": {"z": "${x}"}}))
    config = open_config(folder / "any.yaml")
    assert config is None or config.y.z == config.trainer


def dumped(value: object) -> str:
    file = io.StringIO()
    yaml.safe_dump(value, file, allow_unicode=False)
    return file.getvalue()


@given(data=st.data())
def test_shipped_configs_with_other_bytes(folder, data):
    path = data.draw(st.sampled_from(SHIPPED))
    content = data.draw(mutated(path.read_bytes()))
    (folder / "mutated.yaml").write_bytes(content)
    open_config(folder / "mutated.yaml")


@given(data=st.data())
def test_shipped_configs_with_other_values(folder, data):
    path = data.draw(st.sampled_from(SHIPPED))
    value = yaml.safe_load(path.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        value = data.draw(changed(value))
    (folder / "changed.yaml").write_text(dumped(value))
    open_config(folder / "changed.yaml")


@given(data=st.data())
def test_references(folder, data):
    """Keys that refer to each other in every way, circles and doublings among them."""
    names = [f"k{i}" for i in range(data.draw(st.integers(1, 12)))]
    place = st.sampled_from([*names, *(f"{name}.x" for name in names), *(f"{name}[0]" for name in names), "trainer"])
    reference = place.map(lambda name: f"${{{name}}}")
    value = st.recursive(
        st.one_of(
            reference,
            reference.map("a{0}b{0}".format),
            reference.map("{0}{{oc.env:SECRET}}".format),
            st.sampled_from(["$", "{oc.env:SECRET}", "\\", 1]),
        ),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("xy"), inner, max_size=2)),
        max_leaves=6,
    )
    (folder / "one.yaml").write_text(dumped({name: data.draw(value) for name in names}))
    (folder / "two.yaml").write_text(dumped({"include": "one.yaml"} | {name: data.draw(value) for name in names[::2]}))
    config = open_config(folder / "two.yaml")
    assert config is None or "${" not in str(config)


@given(data=st.data())
def test_overrides(folder, data):
    (folder / "plain.yaml").write_text("a: {b: [1, {c: 2}]}\nd: ${a.b}\n")
    key = st.lists(
        st.sampled_from(["a", "b", "c", "d", "trainer", ".", "[0]", "[1]", "[99999]", "x", "_", "-"]), max_size=6
    )
    overrides = data.draw(
        st.lists(
            st.one_of(
                st.tuples(key.map("".join) | key.map(".".join), st.one_of(YAML, ODD_TEXT, ODD_VALUE.map(str))).map(
                    "=".join
                ),
                ODD_TEXT,
            ),
            max_size=3,
        )
    )
    open_config(folder / "plain.yaml", *overrides)


@given(data=st.data())
def test_includes(folder, data):
    names = st.sampled_from(
        ["a.yaml", "b.yaml", "../x.yaml", "/etc/passwd", ".", "", "sub/../a.yaml", "/dev/zero", "\0"]
    )
    include = st.one_of(
        names, st.lists(names | ODD_TEXT, max_size=4), ODD_VALUE, names.map(lambda name: str(ROOT / name))
    )
    for name in ("a.yaml", "b.yaml"):
        (folder / name).write_text(dumped({"include": data.draw(include), "trainer": {}}))
    open_config(folder / "a.yaml")


@cache
def targets() -> list[str]:
    """Every class and function in our sources, and what configs of others might wish for."""
    found = [*OTHERS, *PLAIN, "os.system", "builtins.eval", "torch.load", "torch.hub.load", "subprocess.Popen"]
    for file in sorted(file for package in OWN for file in (ROOT / package).rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        nodes = ast.parse(file.read_text()).body
        found += [f"{module}.{node.name}" for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return found


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What the classes for configs import is imported: from here on, a target that imports more fails."""
    for target in targets():
        with contextlib.suppress(UnknownTarget):
            find_class(target)


TARGET = st.deferred(
    lambda: st.one_of(
        st.sampled_from(targets()),
        st.lists(st.sampled_from([*OWN, "torch", "os", "unet", "UNet", "__init__", "_x", "Path", ""]), max_size=5).map(
            ".".join
        ),
        ODD_TEXT,
    )
)


@given(target=TARGET)
def test_targets(target):
    found = read(find_class, target)
    assert found is None or (isinstance(found, type) and (found.__module__.split(".")[0] in OWN or target in OTHERS))


@given(data=st.data())
def test_parameters(data):
    target = data.draw(TARGET)
    cls = read(find_class, target)
    names = st.sampled_from([*inspect.signature(cls).parameters, "x"]) if cls else ODD_TEXT
    node = st.fixed_dictionaries({"target": TARGET, "params": st.dictionaries(ODD_TEXT, ODD_VALUE, max_size=2)})
    params = data.draw(st.dictionaries(names, ODD_VALUE | node, max_size=4) | ODD_VALUE)
    read(check, {"model": {"target": target, "params": params}})
