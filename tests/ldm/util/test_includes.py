import os

import pytest

from ldm.util.includes import CHAIN, FILES, ROOT, with_included
from ldm.util.yamlfile import NODES, NotPlain


def test_what_is_included_comes_first(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "b.yaml").write_text("x: 2\ninclude: ../c.yaml")
    (tmp_path / "c.yaml").write_text(f"x: 1\ninclude: {ROOT}/configs/data/templates.yaml")
    (tmp_path / "a.yaml").write_text("include: parts/b.yaml\nx: 3")
    loaded = with_included(tmp_path / "a.yaml")
    assert [path.name for path, _ in loaded] == ["templates.yaml", "c.yaml", "b.yaml", "a.yaml"]
    assert [values.get("x") for _, values in loaded] == [None, 1, 2, 3]


@pytest.mark.parametrize("kind", ["up", "absolute", "link", "by way of the repository", "a linked folder"])
def test_a_file_elsewhere_is_not_read(tmp_path, kind):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "here"
    elsewhere.mkdir(), folder.mkdir()
    (elsewhere / "secret.yaml").write_text("password: 1")
    included = {
        "up": "../elsewhere/secret.yaml",
        "absolute": f"{elsewhere}/secret.yaml",
        "link": "link.yaml",
        "by way of the repository": f"{ROOT}/configs/{'../' * 20}{elsewhere}/secret.yaml",
        "a linked folder": "linked/secret.yaml",
    }[kind]
    os.symlink(elsewhere / "secret.yaml", folder / "link.yaml")
    os.symlink(elsewhere, folder / "linked")
    (folder / "a.yaml").write_text(f"include: {included}")
    with pytest.raises(NotPlain, match="lies neither beside the config nor in the repository") as raised:
        with_included(folder / "a.yaml")
    assert "password" not in str(raised.value)


def test_the_file_itself_may_be_a_link(tmp_path):
    (tmp_path / "there").mkdir(), (tmp_path / "here").mkdir()
    (tmp_path / "there" / "a.yaml").write_text("include: b.yaml\nx: 1")
    os.symlink(tmp_path / "there" / "a.yaml", tmp_path / "here" / "a.yaml")
    (tmp_path / "here" / "b.yaml").write_text("y: 2")
    assert with_included(tmp_path / "here" / "a.yaml")[0][1] == {"y": 2}


def test_circles_and_chains_and_many(tmp_path):
    (tmp_path / "a.yaml").write_text("include: [b.yaml]")
    (tmp_path / "b.yaml").write_text("include: a.yaml")
    with pytest.raises(NotPlain, match="a.yaml: includes itself, by way of .*b.yaml"):
        with_included(tmp_path / "a.yaml")
    for i in range(CHAIN + 1):
        (tmp_path / f"{i}.yaml").write_text(f"include: {i + 1}.yaml")
    with pytest.raises(NotPlain, match=f"{CHAIN}.yaml: one of more than"):
        with_included(tmp_path / "0.yaml")
    (tmp_path / "leaf.yaml").write_text("x: 1")
    for i, within in enumerate(["leaf", "d0", "d1", "d2"]):  # 9 ** 4 files
        (tmp_path / f"d{i}.yaml").write_text(f"include: [{', '.join([f'{within}.yaml'] * 9)}]")
    with pytest.raises(NotPlain, match=f"one of more than {FILES} files"):
        with_included(tmp_path / "d3.yaml")


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ("{a: b}", "include: a file, or a list of files"),
        ("[1]", "include: a file, or a list of files"),
        ("1", "include: a file, or a list of files"),
        ("${x}", "no such config file"),
        ('"\\0"', "no such config file"),
        ('"a\\0b"', "no such config file"),
        ("x" * 5000, "no such config file"),
        ("circle.yaml", "no such config file"),
        (".", "no such config file"),
        ("/dev/zero", "no such config file"),
        ("/proc/self/environ", "lies neither"),
    ],
)
def test_what_is_no_file(tmp_path, include, message):
    os.symlink(tmp_path / "circle.yaml", tmp_path / "circle.yaml")
    (tmp_path / "a.yaml").write_text(f"include: {include}")
    with pytest.raises(NotPlain, match=message) as raised:
        with_included(tmp_path / "a.yaml")
    assert len(str(raised.value)) < 600


def test_values_of_all_files_count_together(tmp_path):
    (tmp_path / "many.yaml").write_text("".join(f"k{i}: 1\n" for i in range(NODES // 3)))
    (tmp_path / "a.yaml").write_text("include: [many.yaml, many.yaml]")
    assert len(with_included(tmp_path / "a.yaml")) == 3
    (tmp_path / "a.yaml").write_text("include: [many.yaml, many.yaml, many.yaml, many.yaml]")
    with pytest.raises(NotPlain, match="many.yaml: more than 10,000 values, with those of the files before it"):
        with_included(tmp_path / "a.yaml")
