"""Readers of files that anyone may have made, on files that nobody would make.

The usual suite runs the profile `short`, the same examples each time. The long one takes more than half an hour:

OMP_NUM_THREADS=1 python -m pytest tests/fuzz --hypothesis-profile=long -p no:cacheprovider
"""

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

USUAL = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("short", max_examples=80, derandomize=True, **USUAL)
settings.register_profile("long", max_examples=12_000, derandomize=False, **USUAL)


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("short")


def _sibling(name: str) -> None:
    """Makes `import fuzz_<name>` work for the tests of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


for name in ("guard", "mutations"):
    _sibling(name)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files lie that are read."""
    return tmp_path_factory.mktemp("fuzz")
