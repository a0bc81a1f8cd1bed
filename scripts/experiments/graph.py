"""The tasks of an experiment: photos -> class images -> training -> measuring -> report.

A task is known by what determines its result: its config with nothing left open, the tasks that it needs, and the
SHA-256 of the photos, weights and other files that it reads. So it is repeated when one of these changes, and only
then; our own code's version is not among them.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import main as training
from data.photos import PhotoFolder
from infusion.metrics.run.options import Options
from infusion.metrics.run.protocol import Protocol
from ldm.training.config import INPUTS, read_config, texts, weight_files
from ldm.util.config import ROOT, find
from ldm.util.defaults import CLIPSEG, POCKET, POCKET_CLIP, POCKET_CLIPSEG
from ldm.util.digests import sha256
from ldm.util.folders import is_run
from scripts.experiments.config import Experiment, Subject, Variant, arguments, as_flags, step_file

OWN = {"clip": POCKET_CLIP, "clipseg": POCKET_CLIPSEG, "model_weight": POCKET_CLIPSEG}  # where a flag says `pocket`
RESULT = "\0"  # stands in commands for the path that a task makes
KINDS = ("photos", "class images", "train", "measure", "report")


@dataclass(frozen=True)
class Task:
    """One command.

    Attributes:
        name: what it is about. key: hash of what determines its result.
        folder: of its log and marks; in it, `result` is what it makes.
        command: that starts it. run: the run folder of a training, which is resumed once it has begun.
        needs: tasks that have to be done before. after: tasks that have to have ended.
        like: names what takes as long for each of `count` steps, samples or images. files: that a training keeps.
    """

    kind: str
    name: str
    key: str
    folder: Path
    command: tuple[str, ...]
    result: Path
    needs: tuple["Task", ...] = ()
    after: tuple["Task", ...] = ()
    like: str = ""
    count: int = 0
    files: int = 0

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def is_done(self) -> bool:
        return (self.folder / "done").is_file()

    def to_run(self) -> list[str]:
        """The command now: a training that has begun is resumed."""
        if self.kind == "train" and is_run(self.result):
            return [sys.executable, str(ROOT / "main.py"), "-t", "--resume", str(self.result)]
        return list(self.command)

    def shown(self) -> str:
        return f"{self.kind}: {self.name}"


@dataclass(frozen=True)
class Row:
    """A row of the report.

    Attributes:
        made: its training; None for what is from elsewhere. path: of the run folder, a file in it or elsewhere, or
            pictures.
        networks: SHA-256 of those that measure it where no flag names others.
    """

    variant: Variant
    subject: Subject
    seed: int | None
    photos: Task
    made: Task | None
    path: str
    networks: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        """As the report shows it."""
        said = (self.variant.name, self.subject.name.replace("_", " "), self.seed)
        return " · ".join(str(part) for part in said if part is not None)


class Graph:
    """The tasks of an experiment in the folder `out`.

    Attributes:
        rows: of the report. measures: the task that measures each of them; () where nothing is measured.
        tasks: all but the report, in the order in which they are started.
    """

    def __init__(self, experiment: Experiment, out: Path) -> None:
        self.experiment, self.out = experiment, out
        self.samples = (experiment.measure or {}).get("samples", Options().samples)
        self._tasks: dict[str, Task] = {}
        photos = {subject.name: self._photos(subject) for subject in experiment.subjects}
        self.rows = [self._row(*run, photos[run[1].name]) for run in experiment.runs()]
        self.measures = [] if experiment.measure is None else self._measures()
        self.tasks = sorted(self._tasks.values(), key=lambda task: KINDS.index(task.kind))

    def _task(self, kind: str, name: str, what: object, command: Iterable[object], result: str, **more) -> Task:
        said = json.dumps([kind, what], sort_keys=True).replace(json.dumps(str(self.out))[1:-1], "OUT")
        key = hashlib.sha256(said.encode()).hexdigest()[:12]
        folder = self.out / kind.replace(" ", "_") / f"{name.replace(' ', '-')}-{key}"
        words = tuple(str(word).replace(RESULT, str(folder / result)) for word in command)
        task = Task(kind, name, key, folder, (sys.executable, *words), folder / result, **more)
        return self._tasks.setdefault(key, task)

    def _photos(self, subject: Subject) -> Task:
        """A copy of the photos, with masks by CLIPSeg where these are wanted: nothing is written beside them."""
        masks = self.experiment.masks
        own = [] if masks is None else as_flags(masks | {"super_class": subject.superclass})
        folder = find(subject.folder)
        there = PhotoFolder.read(folder)
        files = [(photo.path, photo.caption, photo.mask if masks is None else None) for photo in there.photos]
        read = [path for path in chain.from_iterable(files) if path is not None]
        networks = {} if masks is None else digests({"model_weight": CLIPSEG} | masks)
        what = [subject.name, own, networks, [(str(path.relative_to(folder)), digest(path)) for path in read]]
        command = [ROOT / "scripts/experiments/photos.py", folder, RESULT, *own]
        return self._task("photos", subject.name, what, command, subject.name)

    def _row(self, variant: Variant, subject: Subject, seed: int | None, photos: Task) -> Row:
        if seed is None:
            return Row(variant, subject, seed, photos, None, variant.place(subject))
        words = arguments(variant, subject, seed, photos.result)
        config, needs = read_config(training.parse(words)), [photos]
        files, nodes = files_of(config), OmegaConf.to_container(config)
        if prior := (nodes["data"]["params"].get("prior") or {}).get("params"):
            what = [nodes["model"]["params"]["sd"], {key: prior[key] for key in prior if key != "root"}, files]
            command, root = ROOT / "scripts/experiments/class_images.py", "data.params.prior.params.root"
            drawn = [command, *words, f"{root}={RESULT}"]
            images = self._task("class images", subject.superclass, what, drawn, "images", count=prior["count"])
            needs.append(images)
            words.append(f"{root}={images.result}")
            prior["root"] = ""  # among what is needed
        steps = nodes["trainer"].get("max_steps", 0)
        every = OmegaConf.select(config, "callbacks.concept.params.every", default=steps or 1)
        name, what = f"{variant.name} {subject.name} {seed}", [nodes, files, [task.key for task in needs]]
        command = [ROOT / "main.py", "-t", "--logdir", RESULT, *words, "trainer.enable_progress_bar=false"]
        size = {"like": variant.like, "count": steps, "files": ceil(steps / every)}
        made = self._task("train", name, what, command, "run", needs=tuple(needs), **size)
        path = made.result / step_file(variant, config)
        return Row(variant, subject, seed, photos, made, str(path), networks_of(config))

    def _measures(self) -> list[Task]:
        """A task for each row; the first of a noun and protocol makes what is the base model's before the others."""
        first: dict[tuple[str, str], Task] = {}
        found = []
        for row in self.rows:
            base = (row.subject.superclass, row.subject.protocol)
            after = (first[base],) if base in first else ()
            found.append(self._metrics("measure", row.label.replace(" · ", " "), [row], after))
            first.setdefault(base, found[-1])
        return found

    def report(self, rows: Sequence[Row]) -> Task:
        """Gathers rows that have been measured."""
        return self._metrics("report", self.experiment.name, rows)

    def _metrics(self, kind: str, name: str, rows: Sequence[Row], after: tuple[Task, ...] = ()) -> Task:
        rows = sorted(rows, key=lambda row: bool(row.variant.pictures))  # as the command wants them
        concepts = [row for row in rows if not row.variant.pictures]
        columns = {
            "personalized_ckpt": [row.path for row in concepts],
            "labels": [row.label for row in concepts],
            "groups": [row.variant.name.replace("_", " ") for row in rows],
            "images": [str(row.photos.result) for row in rows],
            "protocol": [row.subject.protocol for row in rows if row.subject.protocol],
        }
        flags = dict(self.experiment.measure) | {key: values for key, values in columns.items() if values}
        words = as_flags(flags | {"cache": str(self.out / "cache")})
        for row in rows[len(concepts) :]:
            words += ["--pictures", f"{row.label}={row.path}"]
        words += ["--superclass", rows[-1].subject.superclass] if rows[len(concepts) :] else []
        for subject in dict.fromkeys(row.subject for row in rows):
            words += ["--described", subject.words] if subject.words else []
        needs = tuple(dict.fromkeys(task for row in rows for task in (row.photos, row.made) if task))
        read = [digests(self.experiment.measure), *(row.networks for row in rows)]
        protocols = [Protocol.load(row.subject.protocol).as_dict() for row in rows if row.subject.protocol]
        others = [digest(find(row.path)) for row in rows if not row.made]
        what = [words, read, protocols, others, [task.key for task in needs]]
        command = [ROOT / "scripts/metrics.py", *words, "--out", RESULT]
        single = kind == "measure"
        size = {"like": rows[0].variant.like if single else "", "count": single * self.samples}
        return self._task(kind, name, what, command, "report", needs=needs, after=after, **size)


def files_of(config: DictConfig) -> dict[str, str]:
    """SHA-256 of what a training reads beside photos: weights, a covariance, networks that judge."""
    found = {key: digest(file) for key, file in weight_files(config).items()}
    nodes = OmegaConf.to_container(config)
    for key, name in texts({node: nodes[node] for node in ("data", "model", "callbacks") if node in nodes}):
        if any(key.endswith(f".{end}") for end in INPUTS) and not key.endswith("data_root"):
            found |= digests({key.rpartition(".")[2]: name})
    return found


def networks_of(config: DictConfig) -> dict[str, str]:
    """SHA-256 of a pocket world's own networks, which measure there and lie beside the base model."""
    if not config.sd.params.name.startswith(POCKET):
        return {}
    return {file.name: digest(file) for file in sorted(find(config.ckpt).parent.glob("*.safetensors"))}


def digests(flags: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the files and folders that flags name."""
    named = {flag: find(OWN.get(flag, value) if value == POCKET else str(value)) for flag, value in flags.items()}
    return {flag: digest(path) for flag, path in named.items() if path.exists()}


@cache
def digest(path: Path) -> str:
    """SHA-256 of a file, or of all that a folder holds."""
    if not path.is_dir():
        return sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return hashlib.sha256(json.dumps([(str(f.relative_to(path)), sha256(f)) for f in files]).encode()).hexdigest()
