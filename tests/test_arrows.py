"""Which package may import which: ldm <- clipseg <- data | infusion <- main, scripts."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {  # package -> those of ours that it may import, beside itself
    "ldm": (),
    "clipseg": ("ldm",),
    "data": ("ldm", "clipseg"),
    "infusion": ("ldm", "clipseg"),
    "main": ("ldm", "clipseg", "data", "infusion", "scripts"),
    "scripts": ("ldm", "clipseg", "data", "infusion", "main"),
}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = [file for name in ALLOWED for file in (sorted((ROOT / name).rglob("*.py")) or [ROOT / f"{name}.py"])]
MODULES = {name_of(file) for file in SOURCES} | set(ALLOWED)


def module_of(name: str) -> str:
    """The longest beginning of a dotted name that is a module of ours; "" if there is none."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def named(tree: ast.AST) -> Iterator[str]:
    """Modules of ours that a source imports, wherever it does, or that a string of it names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (module_of(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (module_of(f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in (found := module_of(node.value)):
            yield found


def wrong(module: str, source: str) -> set[str]:
    """The arrows of a module that point where none may, as "module -> other module"."""
    package = module.partition(".")[0]
    others = {other for other in named(ast.parse(source)) if other}
    allowed = (package, *ALLOWED[package])
    return {f"{module} -> {other}" for other in others if other.partition(".")[0] not in allowed}


def test_arrows_point_one_way():
    found = set().union(*(wrong(name_of(file), file.read_text(encoding="utf-8")) for file in SOURCES))
    assert sorted(found) == []


@pytest.mark.parametrize(
    ("module", "line", "other"),
    [
        ("ldm.pipeline", "from infusion.gate import Gate", "infusion.gate"),
        ("ldm.pipeline", "from infusion import gate", "infusion.gate"),
        ("ldm.pipeline", "import clipseg.model as model", "clipseg.model"),
        ("ldm.pipeline", "def f():\n    import data.prompts", "data.prompts"),
        ("ldm.pipeline", "KINDS = {'infusion.methods.base.Method'}", "infusion.methods.base"),
        ("clipseg.model", "from data.prompts import TEMPLATES", "data.prompts"),
        ("data.prompts", "from infusion.gate import Gate", "infusion.gate"),
        ("infusion.gate", "from data.prompts import TEMPLATES", "data.prompts"),
        ("infusion.gate", "from scripts.metrics import main", "scripts.metrics"),
        ("infusion.gate", "import main", "main"),
    ],
)
def test_each_of_them_is_seen(module, line, other):
    assert wrong(module, line) == {f"{module} -> {other}"}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("infusion.gate", "from ldm.pipeline import StableDiffusion"),
        ("infusion.gate", "import torch, clipseg.model"),
        ("scripts.metrics", "from data.prompts import TEMPLATES"),
        ("main", "from infusion.gate import Gate"),
        ("ldm.pipeline", "key = 'data.params.batch_size'"),  # of a config
    ],
)
def test_others_are_not(module, line):
    assert wrong(module, line) == set()
