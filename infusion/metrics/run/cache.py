"""Measured rows on disk, so that a killed run goes on and the next one reuses what it has in common with this.

A stage is a table of rows that do not depend on each other (one for each prompt and seed) and all that determines them:
hashes of models and files, prompts, the first seed, settings. It lies in `<stage>-<hash of that>.safetensors`. Rows are
made in batches and the file is replaced after each, so that a killed run loses one batch. How many rows are wanted is
no part of the hash: a table that is too short is continued.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ldm.util.cli import UserError
from ldm.util.dist import Ranks
from ldm.util.files import write
from ldm.weights.checkpoint import write as write_tensors

WHAT = "what"  # key of a file's metadata: all that determines the rows, as JSON

Make = Callable[[range], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Rows:
    """The rows of a stage.

    Attributes:
        key: names what they are; stages that are made from these have it among what determines them.
        tensors: on the CPU, each (N, …).
    """

    key: str
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))


class Cache:
    """Stages in a folder.

    Args:
        folder: made when the first rows are written.
        progress: show a bar for each stage of which rows have to be made.
        ranks: processes that share the making of rows and call every method alike. The first one's folder counts.
    """

    def __init__(self, folder: str | Path, progress: bool = False, ranks: Ranks | None = None) -> None:
        self.folder, self.ranks = Path(folder), Ranks() if ranks is None else ranks
        self.progress = progress and self.ranks.first

    def rows(
        self, stage: str, what: Mapping[str, object], count: int, batch_size: int, make: Make, title: str = ""
    ) -> Rows:
        """The first rows of a stage.

        Args:
            stage: its name, the beginning of the file's.
            what: all that determines the rows, as JSON has it; row i depends on it and on i alone.
            count: N, how many.
            batch_size: how many to make at a time.
            make: a range of row numbers -> tensors (n, …), the same names every time.
            title: of the progress bar.

        Raises:
            UserError: the file is damaged, or cannot be written.
        """
        key, said = _key(stage, what)
        path = self.folder / f"{key}.safetensors"
        found = self.ranks.of_first(_tensors(path) if self.ranks.first else {})
        done = len(next(iter(found.values()))) if found else 0
        hidden = not self.progress or done >= count
        with tqdm(total=count, initial=min(done, count), desc=title or stage, disable=hidden) as bar:
            for start in range(done, count, batch_size * self.ranks.world):
                rows = self.ranks.share(range(start, count), batch_size)
                made = {name: tensor.detach().cpu() for name, tensor in make(rows).items()} if rows else {}
                parts = [part for part in (found, *self.ranks.gather(made)) if part]
                found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                if self.ranks.first:
                    write_tensors(path, found, {WHAT: said})
                bar.update(min(batch_size * self.ranks.world, count - start))
        return Rows(key, {name: tensor[:count] for name, tensor in found.items()})

    def figures(self, stage: str, what: Mapping[str, object], make: Callable[[], dict]) -> dict:
        """What `make` gives, numbers and words as JSON has them, in `<stage>-<hash>.json`; otherwise as `rows`."""
        key, said = _key(stage, what)
        path = self.folder / f"{key}.json"
        if not self.ranks.of_first(path.is_file()):
            made = make()
            if self.ranks.first:
                write(path, json.dumps({WHAT: json.loads(said), stage: made}, allow_nan=False).encode())
        return self.ranks.of_first(_figures(path, stage) if self.ranks.first else None)


def _tensors(path: Path) -> dict[str, Tensor]:
    """What a file of rows holds; {} for one that is not there."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged ({error}); delete it, and it is made again") from error


def _figures(path: Path, stage: str) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[stage]
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); delete it, and it is made again") from error


def _key(stage: str, what: Mapping[str, object]) -> tuple[str, str]:
    """A stage's name on disk, and what determines it as JSON."""
    said = json.dumps(what, sort_keys=True)
    return f"{stage}-{hashlib.sha256(said.encode()).hexdigest()[:20]}", said
