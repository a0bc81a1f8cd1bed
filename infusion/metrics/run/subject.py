"""What is measured: a concept, and all that is known about where it came from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from infusion.concepts import file as concept_file
from infusion.concepts.concept import Concept
from infusion.concepts.others import IN_FOLDERS
from infusion.concepts.runs import concept_files
from infusion.gate import IDENTITY
from infusion.methods import method_of
from infusion.metrics.run.options import CONCEPT, PICTURES, WORDS
from infusion.sampling.png import hashes
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError
from ldm.util.config import find

LONGEST = 4096  # characters of a name in a report
MODELS = "models"  # a run's folder of concept files


class ExactMeasures(Protocol):
    """Measures of a concept of which everything is known, such as one of the pocket world.

    Attributes: `name`; `described`, the concept in words: "a blue striped dog".
    """

    name: str
    described: str

    def measure(self, templates: Sequence[str], superclass: str, ours: Tensor, base: Tensor) -> dict[str, dict]:
        """Figures by name, for images (N, 3, H, W) in [0, 1] of N prompts: ours with the concept, base without."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A concept at one moment of its training; `sha256` is of its file, or of its contents."""

    concept: Concept
    sha256: str
    file: str = ""

    @classmethod
    def load(cls, path: Path, said: Mapping[str, str] | None = None) -> Self:
        """A concept file, or a file of another tool; raises UserError as `Concept.load`.

        Args:
            said: superclass and noun of a file of another tool; what a file says itself counts.
        """
        if said and path.is_file():
            with concept_file.opened(path) as content:
                known = said if concept_file.is_concept(content) else content.metadata  # ours say everything
                said = {name: word for name, word in said.items() if name not in known}
        concept = Concept.load(path, **(said or {}))
        return cls(concept, hashes(None, [str(path)], IDENTITY)["personalized_sha256"], str(path))

    @classmethod
    def of(cls, concept: Concept) -> Self:
        """A concept that lies in no file."""
        digest = hashlib.sha256()
        said = {key: value for key, value in concept.metadata().items() if "date" not in key}
        digest.update(json.dumps(said, sort_keys=True).encode())
        for name in sorted(concept.tensors):
            digest.update(name.encode())
            digest.update(concept.tensors[name].contiguous().numpy().tobytes())
        return cls(concept, digest.hexdigest())


def untrained(sd: StableDiffusion, concept: Concept) -> Checkpoint:
    """The concept as its method starts, before anything is learned; trainings of one kind have it in common.

    Args:
        sd: the base model, without edits.
    """
    learned = method_of(concept).start(sd, concept.word)
    start = {name: tensor.detach().cpu() for name, tensor in learned.items()}
    unknown = {"steps": 0, "learning_rate": 0.0, "seed": 0, "batch_size": 0}
    return Checkpoint.of(replace(concept, tensors=start, **unknown))


@dataclass(frozen=True)
class Pictures:
    """Pictures that something else has drawn.

    Attributes:
        folder: where they are from.
        images: (N, 3, S, S) in [0, 1], N ≥ 2; None before they are read.
        prompts: picture i has the i-th, going round; with {} for the concept.
        rule: which prompt belongs to which, in words.
        left_out: how many images of the folder are not among them.
    """

    folder: str
    images: Tensor | None = None
    prompts: tuple[str, ...] = ()
    rule: str = ""
    left_out: int = 0


@dataclass(frozen=True)
class Subject:
    """One row of the results: a concept, words for one in its place, or pictures of one that were drawn elsewhere.

    Attributes:
        label: its name there.
        checkpoints: in the order of training; the last is measured, the others are for LFD over training steps.
        photos: of the concept, (P, 3, H, W) in [0, 1]; None where there are none.
        photos_from: the folder of these. left_out: how many of its images are not among them.
        crop: how they are cropped, "subject" or "middle".
        exact: what can be said exactly; None where nothing can.
        group: the results that it is gathered with; "" is its method's.
        described: a concept in words, which the base model draws in place of {}.
        pictures: drawn elsewhere.
        superclass: the noun of what the concept is one of; "" takes that of the checkpoints.
        training: the training that this is an epoch of (`infusion.metrics.run.epochs`), by its first file's label; "":
            of none.
        epoch: its place among the epochs that are measured, from 1.
        protocol: the file of its prompts.
    """

    label: str
    checkpoints: tuple[Checkpoint, ...] = ()
    photos: Tensor | None = None
    photos_from: str = ""
    left_out: int = 0
    crop: str = ""
    exact: ExactMeasures | None = None
    group: str = ""
    described: str = ""
    pictures: Pictures | None = None
    superclass: str = ""
    training: str = ""
    epoch: int = 0
    protocol: str = ""

    def __post_init__(self) -> None:
        if not self.superclass:
            object.__setattr__(self, "superclass", self.concept.superclass)

    @property
    def kind(self) -> str:
        if self.pictures is not None:
            return PICTURES
        return WORDS if self.described else CONCEPT

    @property
    def last(self) -> Checkpoint:
        return self.checkpoints[-1]

    @property
    def concept(self) -> Concept:
        return self.last.concept

    @property
    def has_photos(self) -> bool:
        return self.photos is not None or bool(self.photos_from)

    @property
    def name(self) -> str:
        """What the concept is known by: its name in the world, its folder of photos, or its superclass."""
        return (self.exact and self.exact.name) or self.photos_from or self.superclass

    @property
    def anchored(self) -> bool:
        """Whether prompts without the concept give the base model's prediction, whatever was learned.

        So it is where no weight changes and the gate is closed outside the concept's own tokens.
        """
        method, tensors = method_of(self.concept), self.concept.tensors
        changes = method.differences(tensors) | method.outputs(tensors)
        return not changes and self.concept.gate.kind != "global"

    def about(self) -> dict[str, object]:
        """For JSON; what no training has is 0, "" or None."""
        said = {"kind": self.kind, "method": self.kind, "group": self.group or self.kind}
        said |= {"superclass": self.superclass, "noun": self.described or self.superclass}
        said |= {"training_steps": 0, "training_samples": None}
        said |= {"learning_rate": 0.0, "training_seed": None, "numbers": 0, "file": "", "anchored": False}
        used = 0 if self.photos is None else len(self.photos)
        said |= {"photos_used": used, "photos_left_out": self.left_out, "photos_crop": self.crop}
        said |= {"photos": self.photos_from, "world_concept": self.exact.name if self.exact else ""}
        if self.kind == WORDS:
            return said | {"described": self.described, "sha256": hashlib.sha256(self.described.encode()).hexdigest()}
        if self.kind == PICTURES:
            said |= {"group": self.group or self.label, "file": self.pictures.folder}
            said |= {"pictures_used": len(self.pictures.images), "pictures_left_out": self.pictures.left_out}
            said |= {"prompts": list(self.pictures.prompts), "prompts_by": self.pictures.rule}
            return said | {"sha256": fingerprint(self.pictures.images)}
        concept = self.concept
        said |= {"epoch_of": self.training, "epoch": self.epoch} if self.training else {}
        return said | {
            "method": concept.method,
            "group": self.group or concept.method,
            "noun": concept.noun,
            "training_steps": concept.steps,
            "training_samples": concept.steps * concept.batch_size if concept.batch_size else None,
            "learning_rate": concept.learning_rate,
            "best_step": best_step(self.last.file),
            "training_seed": concept.seed,
            "numbers": concept.numbers,
            "file": self.last.file,
            "sha256": self.last.sha256,
            "anchored": self.anchored,
        }

    def with_photos(self, photos: Tensor, folder: str = "", left_out: int = 0) -> Self:
        """The same with photos (P, 3, H, W) in [0, 1]; raises ValueError for fewer than 2."""
        if len(photos) < 2:
            raise UserError(f"--images: {folder or 'these'} are fewer than 2 photos, too few for a ceiling")
        return replace(self, photos=photos, photos_from=folder, left_out=left_out)


def in_words(subjects: Sequence[Subject], described: Sequence[str]) -> list[Subject]:
    """A row for each concept among some, however often it was learned: the base model told it in words.

    Args:
        described: for each of the subjects, "a striped blue dog"; "" for none.
    """
    told = {}
    for subject, words in zip(subjects, described, strict=True):
        if words:
            told.setdefault((subject.name, subject.superclass, words), subject)
    several = len({name for name, _, _ in told}) > 1
    rows = []
    for (name, _, words), subject in told.items():
        label = f"words {Path(name).name}" if several else f"words: {words}"
        if label in (row.label for row in rows):  # folders of one name, or a concept told twice
            label = f"words {name}: {words}"
        own = {"group": "", "checkpoints": (), "pictures": None, "training": "", "epoch": 0}
        rows.append(replace(subject, label=label, described=words, **own))
    return rows


def best_step(file: str) -> int | None:
    """The step that a run marked as its best, by the `best.json` beside its concept file; None where there is none."""
    path = Path(file).with_name("best.json") if file else None
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["best"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no best.json of a training ({error}); remove it") from error


def load_subjects(
    paths: Sequence[str],
    labels: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    said: Mapping[str, str] | None = None,
) -> list[Subject]:
    """Concept files and run folders; a label is by default the name of the run folder or of the file.

    Args:
        groups: one for each path. said: of files of other tools, see `Checkpoint.load`.

    Raises:
        UserError: a file that `Concept.load` refuses, not one label for each, one label twice, or a label, group or
            path that no report can show.
    """
    names = _names([find(path) for path in paths]) if labels is None else list(labels)
    if len(names) != len(paths):
        raise UserError(f"--labels: {len(names)} for {len(paths)} of --personalized_ckpt; give one for each")
    if double := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--labels: two are called {double[0]!r}; give each a name of its own")
    groups = [""] * len(paths) if groups is None else groups
    for flag, words in {"personalized_ckpt": paths, "labels": names, "groups": groups}.items():
        for word in words:
            if not word.isprintable() or len(word) > LONGEST:
                raise UserError(f"--{flag}: a report cannot show the name {word[:80]!a}: choose another (--labels)")
    return [
        Subject(name, tuple(Checkpoint.load(file, said) for file in concept_files(find(path))), group=group)
        for name, path, group in zip(names, paths, groups, strict=True)
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    """What rows are called by default: each file of a run has its own name where there are several of that run."""
    names = [_name(path) for path in paths]
    files = [path.parent.name == MODELS and names.count(name) > 1 for path, name in zip(paths, names, strict=True)]
    return [f"{n} {path.stem}" if file else n for path, n, file in zip(paths, names, files, strict=True)]


def _name(path: Path) -> str:
    """Of a run folder or a file of its models/, the run's; of an adapter in a folder of its own, the folder's."""
    path = path.absolute()
    if path.is_dir():
        return path.name
    return path.parent.parent.name if path.parent.name == MODELS else place_of(path).name


def place_of(file: str | Path) -> Path:
    """What a file is known by: itself without its ending, or the folder of one that is called alike in each."""
    path = Path(file).absolute()
    return path.parent if path.name in IN_FOLDERS else path.with_suffix("")


def fingerprint(images: Tensor) -> str:
    """SHA-256 of images, as 8-bit pixels."""
    pixels = images.mul(255).round().clamp(0, 255).to(torch.uint8).contiguous()
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
