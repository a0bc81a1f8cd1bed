"""Readers of files that anyone may have made, on files that nobody would make.

The usual suite runs the profile `short`, the same examples each time. The long one takes more than half an hour:

OMP_NUM_THREADS=1 python -m pytest tests/fuzz --hypothesis-profile=long -p no:cacheprovider
"""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

USUAL = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("short", max_examples=50, derandomize=True, **USUAL)
settings.register_profile("long", max_examples=12_000, derandomize=False, **USUAL)


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("short")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files lie that are read."""
    return tmp_path_factory.mktemp("fuzz")
