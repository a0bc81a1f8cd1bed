"""Results on disk: `metrics.json`, `metrics.csv`, `plots/`, `side_by_side.png` and `report.html` in one folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from torch import Tensor

from infusion.concepts.concept import now
from infusion.metrics.report.aggregate import READ_AGAINST, Group, Result, groups_of
from infusion.metrics.report.epochs import epochs_of
from infusion.metrics.report.page import page, side_by_side
from infusion.metrics.report.plots import plots
from infusion.metrics.run.options import CACHE
from infusion.sampling.pictures import captioned_grid, png
from ldm.util.cli import UserError
from ldm.util.config import find
from ldm.util.files import holds_work
from ldm.util.files import write as write_file

FORMAT, VERSION = "infusion-metrics", 1
JSON, CSV, REPORT, PLOTS = "metrics.json", "metrics.csv", "report.html", "plots"
PICTURES = "side_by_side.png"
COLUMNS = ("label", "group", "method", "superclass", "training_steps", "training_seed", "metric", "value", "stderr",
           "n", "low", "high", *READ_AGAINST)  # fmt: skip
FREE = ("metrics", "batch_size")  # settings that change no figure


@dataclass(frozen=True)
class Measured:
    """All results of one command.

    Attributes:
        results: what `infusion.metrics.run.evaluate.evaluate` gave for each concept.
        settings: that they have in common.
        files: name of a network -> SHA-256 of its file; `base` is the base model's.
        command: that made them.

    Raises:
        ValueError: two results of one label.
    """

    results: Sequence[Result]
    settings: Mapping[str, object]
    files: Mapping[str, str]
    command: str

    def __post_init__(self) -> None:
        labels = [result["label"] for result in self.results]
        if double := [label for label in labels if labels.count(label) > 1]:
            raise UserError(f"two results are called {double[0]!r}: give each a label of its own")

    @cached_property
    def groups(self) -> list[Group]:
        return groups_of(self.results)

    @cached_property
    def side_by_side(self) -> list[tuple[str, dict[str, Tensor]]]:
        return side_by_side(self.groups)

    def as_dict(self) -> dict[str, object]:
        """What `metrics.json` holds but for the date: the same for the same results."""
        methods = {
            result["label"]: {key: value for key, value in result.items() if key not in ("label", "pictures")}
            for result in self.results
        }
        said = {"format": FORMAT, "version": VERSION, "command": self.command, "settings": dict(self.settings)}
        groups = {group.name: group.figures for group in self.groups}
        if epochs := [each.as_dict() for each in epochs_of(self.results)]:
            said["epochs"] = epochs
        return said | {"files": dict(self.files), "groups": groups, "methods": methods}

    def as_csv(self) -> str:
        """What `metrics.csv` holds: a line for each concept and metric."""
        rows = [
            {**result, "metric": metric, **figure}
            | {name: figure[name]["value"] for name in READ_AGAINST if name in figure}
            for result in self.results
            for metric, figure in result["figures"].items()
        ]
        return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object).to_csv(index=False, lineterminator="\n")


def write(out: str | Path, measured: Measured) -> Path:
    """Write everything, `metrics.json` first, by which the folder is known; returns the report's path.

    Raises:
        UserError: the folder cannot be written.
    """
    out, drawn = Path(out), plots(measured.groups)
    write_file(out / JSON, dump({"date": now()} | measured.as_dict()))
    for name, svg in drawn.items():
        write_file(out / PLOTS / f"{name}.svg", svg.encode())
    write_file(out / CSV, measured.as_csv().encode())
    if rows := dict(measured.side_by_side):
        columns = list(dict.fromkeys(name for shown in rows.values() for name in shown))
        sheet = captioned_grid({said: [shown.get(name) for name in columns] for said, shown in rows.items()}, columns)
        write_file(out / PICTURES, png(sheet))
    write_file(out / REPORT, page(measured, drawn).encode())
    return out / REPORT


def dump(said: Mapping[str, object]) -> bytes:
    """JSON as `metrics.json` has it."""
    return (json.dumps(said, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read(path: str | Path) -> list[Result]:
    """The results in a `metrics.json`, without pictures; raises UserError for another file."""
    try:
        methods = json.loads(find(path).read_text(encoding="utf-8"))["methods"]
        return [{"label": label, **about, "figures": about["figures"]} for label, about in methods.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is no metrics.json ({error})") from error


def check_folder(out: Path, subjects: Mapping[str, str], settings: Mapping[str, object]) -> None:
    """Refuses a folder in which something would be lost.

    A folder of an earlier run is taken where that run measured no other concepts, and nothing in another way: what is
    written holds all that there was.

    Args:
        out: the folder. subjects: label -> SHA-256 of the concept. settings: see `Measured`.

    Raises:
        UserError: it is a file, holds something else, or other results.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder")
    if holds_work(out) and not any((out / name).exists() for name in (JSON, CACHE)):
        raise UserError(f"--out: {out} holds other files; name a new folder")
    if not (out / JSON).exists():
        return
    try:
        before = json.loads((out / JSON).read_text(encoding="utf-8"))
        old = {label: about["sha256"] for label, about in before["methods"].items()}
        old_settings, old_metrics = before["settings"], set(before["settings"]["metrics"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"--out: {out / JSON} is not of this command; name a new folder") from error
    old_settings, kept = ({k: v for k, v in one.items() if k not in FREE} for one in (old_settings, settings))
    if not (old_settings == kept and old.items() <= subjects.items() and old_metrics <= set(settings["metrics"])):
        raise UserError(
            f"--out: {out} has results of other concepts or settings; name a new folder (--cache {out / CACHE} makes "
            "it share what they have in common)"
        )
