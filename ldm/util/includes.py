"""A config file behind those that it includes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.util.yamlfile import NODES, NotPlain, count, read

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (ROOT / "configs", ROOT / "data" / "dreambooth")  # folders of configs of ours
FILES, CHAIN = 64, 8  # that one config may take, and that may include each other in a row
Loaded = list[tuple[Path, dict[str, Any]]]


def with_included(entry: Path) -> Loaded:
    """A file and its values, behind those of the files under its `include` and under theirs, in the order of merging.

    A file includes what lies in `SHIPPED` or in the entry's own folder, links resolved, and nothing else: it may come
    from anyone, and what it includes is shown in messages.

    Raises:
        NotPlain: a file that is missing, elsewhere, or refused by `read`; a circle; too many. The message names it.
    """
    reader = _Reader((*SHIPPED, entry.absolute().parent))
    reader.load(entry, ())
    return reader.loaded


@dataclass
class _Reader:
    folders: tuple[Path, ...]
    loaded: Loaded = field(default_factory=list)
    values: int = 0

    def load(self, path: Path, parents: tuple[Path, ...]) -> None:
        by = f" (included by {parents[-1]})" if parents else ""
        there, true = _resolved(path)
        if true in map(Path.resolve, parents):
            raise NotPlain(f"{path}: includes itself, by way of {parents[-1]}")
        if not there:
            raise NotPlain(f"{str(path)[:300]}: no such config file{by}")
        if parents and not any(true.is_relative_to(folder.resolve()) for folder in self.folders):
            raise NotPlain(
                f"{path}: lies neither beside the config nor in the repository's configs{by}; give it to --base"
            )
        if len(parents) >= CHAIN or len(self.loaded) >= FILES:
            raise NotPlain(
                f"{path}: one of more than {FILES} files, or of {CHAIN} that include each other in a row{by}"
            )
        try:
            values = read(path)
        except NotPlain as error:
            raise NotPlain(f"{path}: {error}") from error
        self.values += count(values)
        if self.values > NODES:
            raise NotPlain(f"{path}: more than {NODES:,} values, with those of the files before it{by}")
        included = values.pop("include", None) or []
        included = [included] if isinstance(included, str) else included
        if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
            raise NotPlain(f"{path}: include: a file, or a list of files, is wanted")
        for name in included:
            self.load(path.parent / name, (*parents, path))
        self.loaded.append((path, values))


def _resolved(path: Path) -> tuple[bool, Path]:
    """Whether it is a file, and where it truly lies."""
    try:
        return path.is_file(), path.resolve()
    except (OSError, ValueError, RuntimeError):  # a name that is too long or has a zero byte, a circle of links
        return False, path
