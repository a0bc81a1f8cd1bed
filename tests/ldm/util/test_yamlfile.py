import json
from pathlib import Path

import pytest

from ldm.util.yamlfile import DEPTH, NODES, SIZE, NotPlain, inspect, read, value


@pytest.fixture
def file(tmp_path: Path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "a.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def bomb(levels: int, width: int = 9) -> str:
    """Mappings of aliases of the mapping before: width ** levels values."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: !!python/object/apply:os.system [ls]", "line 1: has a tag, 'tag:yaml.org,2002:python/object"),
        ("a: !!python/name:os.system", "has a tag"),
        ("a: !!binary aGVsbG8=", "has a tag"),
        ("b: 1\na: !!set {x}", "line 2: has a tag"),
        ("a: !own {x: 1}", "has a tag"),
        ("? !!python/tuple [1]\n: 1", "has a tag"),
        (bomb(5), f"more than {NODES:,} values"),
        (bomb(40), f"more than {NODES:,} values"),
        ("a: &a {b: *a}", r"\*a stands for nothing, or for itself"),
        ("a: *b", r"\*b stands for nothing"),
        ("\n".join(["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 50)]), "within each other"),
        ("- " * 400, "within each other"),
        ("a: " + "[" * 100_000, "within each other"),
        ("a: " + "{b: " * 100_000, "within each other"),
        ("a: " + "[" * 40 + "]" * 40, f"more than {DEPTH} mappings"),
        ("a: [" + "1," * NODES + "]", f"more than {NODES:,} values"),
        ("a: 1\n---\nb: 1", "line 2: a second document"),
        ("a: 1\na: 2", "not a readable YAML file .*duplicate key a"),
        ("a: {b: 1, b: 2}", "not a readable YAML file .*duplicate key b"),
        ("a: [1", "not a readable YAML file"),
        ("a: \x07", "not a readable YAML file"),
        (b"a: \xff", "not UTF-8"),
        ("#" * SIZE + "\n", "is larger than 1,048,576 bytes"),
        ("a: " + "x" * 20_000, "line 1: a value of more than 16,384 characters"),
        ("a: " + "9" * 5000, "not a readable YAML file .ValueError"),
        ("a: " + "9" * 30, "a number is not finite, or too large"),
        ("a: 0x" + "f" * 400, "a number is not finite, or too large"),
        ("a: .inf", "a number is not finite"),
        ("a: [{b: .NaN}]", "a number is not finite"),
        ("a: 1e999", "a number is not finite"),
        ("1: a", "a key is '1'"),
        ("x" * 101 + ": a", "a key has 101 characters: 'xxx"),
        (json.dumps({"a": {"x" * 900: 1}}), "a key has 900 characters"),
        ("on: a", "a key is 'True'"),
        ("~: a", "a key is 'None'|not a readable"),
        ("[1, 2]: a", "not a readable"),
        ("{a: 1}: a", "not a readable"),
        ("- 1", "a config is a mapping of keys to values, not a list"),
        ("words", "a config is a mapping of keys to values, not a value"),
        ("a: ${oc.env:HOME}", "line 1: `..…}` stands for another key"),
        ("a: '${oc.env:HOME,x}'", "stands for another key"),
        ("a: x${oc.env:HOME}y", "stands for another key"),
        ("a: '\\${oc.env:HOME}'", "stands for another key"),
        ("a: '$${b}{oc.env:HOME}'", "^$"),
        ("a: ${a.${b}}", "stands for another key"),
        ("a: ${.b}", "stands for another key"),
        ("a: ${", "stands for another key"),
        ("a: ${oc.create:{x: 1}}", "stands for another key|not a readable"),
        ("${oc.env:HOME}: 1", "stands for another key"),
        ("a: " + "${" * 5000, "stands for another key"),
    ],
)
def test_what_is_no_plain_value_is_refused_in_one_short_line(file, content, message):
    if message == "^$":  # text, which is looked at again once references are replaced
        assert read(file(content)) == {"a": "$${b}{oc.env:HOME}"}
        return
    with pytest.raises(NotPlain, match=message) as raised:
        read(file(content))
    assert len(str(raised.value)) < 250 and "\n" not in str(raised.value)


def test_plain_values(file):
    text = "a: &a {x: 1e-3, y: [no, ~, 'on', 2001-01-01]}\nb: {<<: *a, x: '${a.y[0]}'}\nc: [*a]\nd: ' ${ a-b.c } '\n"
    assert read(file(text)) == {
        "a": {"x": 0.001, "y": [False, None, "on", "2001-01-01"]},
        "b": {"x": "${a.y[0]}", "y": [False, None, "on", "2001-01-01"]},
        "c": [{"x": 0.001, "y": [False, None, "on", "2001-01-01"]}],
        "d": " ${ a-b.c } ",
    }
    assert read(file("")) == read(file("# nothing\n")) == {}


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(NotPlain, match="cannot be read .Is a directory"):
        read(tmp_path)


def test_values_of_overrides():
    assert [value(text) for text in ("1e-3", "[1, {a: b}]", "a b", "", "null", "'1'")] == [
        *(0.001, [1, {"a": "b"}], "a b", None, None, "1")
    ]


def test_what_a_text_is():
    assert [inspect(text) for text in ("a: 1", "[a]", "a", "")] == ["mapping", "list", "value", None]
