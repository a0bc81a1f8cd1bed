"""What no source of ours does, where ruff has no rule for it (pyproject.toml lists those that it has)."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "main.py", *(file for name in ("ldm", "infusion", "clipseg", "data", "scripts")
                               for file in sorted((ROOT / name).rglob("*.py")))]  # fmt: skip
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.loads", "shelve.open", "torch.hub.load"),
    *("torch.jit.load", "torch.package.PackageImporter", "jinja2.Template", "Template"),
}
WANTED = {"torch.load": ("weights_only", True)}  # call -> keyword that it must have
NEVER = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}
HOSTS = {"comfy", "comfy_api", "folder_paths"}  # modules of the program that a source is a part of
SAVES = "trainer.save_checkpoint"  # whose weights_only is about what is written
DYNAMIC = {  # import by a name out of a list, or from a few packages
    "ldm/util/config.py",
    "infusion/__init__.py",
    "infusion/methods/__init__.py",
}


def third_party(file: Path) -> set[str]:
    """The modules from elsewhere that a source imports, by their first names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    ours = {source.relative_to(ROOT).parts[0].removesuffix(".py") for source in SOURCES}
    return found - ours - HOSTS - sys.stdlib_module_names


def plain(distribution: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_import_is_declared():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    declared = {plain(line.split("==")[0]) for line in lines if "==" in line}
    distributions = packages_distributions()  # module -> those that bring it
    undeclared = {}
    for file in SOURCES:
        for module in third_party(file):
            if declared.isdisjoint(map(plain, distributions.get(module, []))):
                undeclared[module] = str(file.relative_to(ROOT))
    assert undeclared == {}


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def problems(file: Path) -> list[str]:
    found = []
    for name, node in calls(file):
        said = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        key, value = WANTED.get(name, (None, None))
        if name in FORBIDDEN or (key and said.get(key) is not value):
            found.append(f"{file.name}:{node.lineno}: {name}")
        if name != SAVES and any(said.get(word) is banned for word, banned in NEVER.items() if word in said):
            found.append(f"{file.name}:{node.lineno}: {name} of {said}")
        if name.endswith("import_module") and not any(file == ROOT / name for name in DYNAMIC):
            found.append(f"{file.name}:{node.lineno}: {name}")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(file):
    assert problems(file) == []


@pytest.mark.parametrize(
    "line",
    [
        *("eval(x)", "os.system(x)", "yaml.load(x, Loader)", "torch.load(x)", "torch.load(x, weights_only=False)"),
        *("subprocess.run(x, shell=True)", "np.load(x, allow_pickle=True)", "importlib.import_module(x)"),
        *("AutoModel.from_pretrained(x, trust_remote_code=True)", "f(g(exec(x)))"),
    ],
)
def test_each_of_them_is_seen(tmp_path, line):
    (tmp_path / "a.py").write_text(line)
    assert problems(tmp_path / "a.py")
