"""How much a config becomes when each `${key}` is replaced by what it stands for, without replacing any.

OmegaConf copies what is referred to. Twenty keys of which each holds the one before it twice would be a million.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ldm.util.yamlfile import REFERENCE

MOST = 20_000  # nodes in all; every 100 characters count as one
HEIGHT = 100  # references, mappings and lists within each other
TOO_MUCH = "becomes too much when each `${…}` is replaced by what it stands for"
Path = tuple[str | int, ...]


class Endless(ValueError):
    """What a config stands for has no end, or is too much; one line that names a key."""


def measure(tree: dict[str, Any]) -> int:
    """Number of nodes of a config whose references are replaced. A reference that leads nowhere is one node.

    Raises:
        Endless: a reference to itself, `MOST` nodes, or more than `HEIGHT` of them within each other.
    """
    return _Measure(tree).of((), tree)[0]


@dataclass
class _Measure:
    tree: dict[str, Any]
    known: dict[Path, tuple[int, int]] = field(default_factory=dict)  # path -> nodes and height of what stands there
    begun: dict[Path, None] = field(default_factory=dict)

    def of(self, path: Path, value: Any) -> tuple[int, int]:
        if path in self.known:
            return self.known[path]
        if path in self.begun:
            raise Endless(f"{named(path)}: stands for itself, by way of its `${{…}}`")
        if len(self.begun) > HEIGHT:
            raise Endless(f"{named(path)}: {TOO_MUCH}")
        self.begun[path] = None
        total, height = 1, 0
        for inner, child in self.parts(path, value):
            nodes, above = self.of(inner, child)
            total, height = total + nodes, max(height, above + 1)
            if total > MOST or height > HEIGHT:
                raise Endless(f"{named(path or inner)}: {TOO_MUCH}")
        del self.begun[path]
        if isinstance(value, str):
            total += len(value) // 100
        self.known[path] = total, height
        return total, height

    def parts(self, path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
        """What lies in a value, and what its references stand for."""
        if isinstance(value, dict | list):
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                yield (*path, key), child
        elif isinstance(value, str) and "${" in value:
            for match in REFERENCE.finditer(value):
                found = self.find(steps(match[1]), 0)
                if found is not None:
                    yield found

    def find(self, path: Path, hops: int) -> tuple[Path, Any] | None:
        """The true path and value behind a path that may lead through other references; None where it ends."""
        place: Path = ()
        value: Any = self.tree
        for step in path:
            while isinstance(value, str) and (whole := REFERENCE.fullmatch(value)):
                hops += 1
                if hops > HEIGHT:
                    raise Endless(f"{named(path)}: stands for itself, by way of its `${{…}}`")
                found = self.find(steps(whole[1]), hops)
                if found is None:
                    return None
                place, value = found
            if isinstance(value, list) and str(step).isdigit() and int(step) < len(value):
                step = int(step)
            elif not isinstance(value, dict) or step not in value:
                return None
            place, value = (*place, step), value[step]
        return place, value


def steps(reference: str) -> Path:
    """`a.b[0]` -> ("a", "b", "0")."""
    return tuple(reference.replace("]", "").replace("[", ".").split("."))


def named(path: Path) -> str:
    return ".".join(map(str, path))[:120] or "config"
