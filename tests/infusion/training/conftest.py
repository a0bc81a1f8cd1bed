"""The networks that measure."""

from tests.infusion.metrics.conftest import tools

__all__ = ["tools"]
