"""The subjects of published benchmarks: photos in the folders that their authors chose, classes and prompts.

| benchmark | layout | prompts |
|---|---|---|
| DreamBooth (Ruiz et al. 2023) | `ROOT/<subject>/*.jpg` | `data/dreambooth/`: 25 for objects, 25 for live subjects |
| CustomConcept101 (Kumari et al. 2023) | `dataset.json`, a list; its paths are relative to it | a file named there |

Photos are fetched by the user; see docs/protocol.md.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath

from omegaconf import OmegaConf

from infusion.metrics.run.protocol import FOLDER, Protocol
from ldm.util.cli import UserError, suggestion
from ldm.util.config import ROOT, find
from ldm.util.files import numbered_lines, read_text

DREAMBOOTH = ROOT / "data" / "dreambooth"
DATASET = "dataset.json"
FIELDS = ("class_prompt", "instance_data_dir", "prompt_filename")  # of a subject in dataset.json


@dataclass(frozen=True)
class BenchmarkSubject:
    """A subject as a benchmark has it.

    Attributes:
        name: its own among the benchmark's subjects.
        superclass: the noun of what it is one of.
        photos: the folder of its photos.
        templates: prompts to draw it by, each with one {}.
        protocol: the file in `configs/protocol` that has these prompts; "" where none has.
    """

    name: str
    superclass: str
    photos: Path
    templates: tuple[str, ...]
    protocol: str = ""

    def as_protocol(self) -> Protocol:
        """The prompts of a measurement: a shipped protocol, or the usual one with these prompts for the concept.

        Of the latter's prompts without the concept, those that name the superclass are left out.
        """
        if self.protocol:
            return Protocol.load(self.protocol)
        usual = Protocol.load(FOLDER / "stable_diffusion.yaml")
        none = tuple(prompt for prompt in usual.none if not set(self.superclass.split()) & set(prompt.split()))
        return replace(usual, concept=self.templates, none=none)


def read(path: str | Path, subjects: Sequence[str] | None = None) -> list[BenchmarkSubject]:
    """`custom_concept_101` for a .json file or a folder with a `dataset.json`, `dreambooth` for another folder."""
    custom = Path(path).suffix == ".json" or (find(path) / DATASET).is_file()
    return custom_concept_101(path, subjects) if custom else dreambooth(path, subjects)


@cache
def dreambooth_prompts(kind: str) -> tuple[str, ...]:
    """DreamBooth's 25 prompts for subjects of a kind, "object" or "live", with {} for the concept."""
    return tuple(OmegaConf.load(DREAMBOOTH / f"{kind}.yaml").concept)


def dreambooth(root: str | Path, subjects: Sequence[str] | None = None) -> list[BenchmarkSubject]:
    """DreamBooth's subjects, in the order of their names.

    Args:
        root: has a folder of photos for each subject.
        subjects: names of some of them, in the order wanted; None: all 30.

    Raises:
        UserError: a name that is none of the 30, a subject without a folder or without photos in it.
    """
    known, found = OmegaConf.load(DREAMBOOTH / "subjects.yaml"), []
    for name in _chosen(list(known), subjects, "DreamBooth"):
        superclass, kind = known[name].superclass, known[name].kind
        photos, file = _photos(find(root) / name, name), f"{FOLDER}/dreambooth_{kind}.yaml"
        found.append(BenchmarkSubject(name, superclass, photos, dreambooth_prompts(kind), file))
    return found


def custom_concept_101(path: str | Path, subjects: Sequence[str] | None = None) -> list[BenchmarkSubject]:
    """Subjects of a file laid out as CustomConcept101's `dataset.json`, in its order.

    A subject has `class_prompt`, its superclass; `instance_data_dir`, the folder of its photos, whose name is the
    subject's; and `prompt_filename`, a text file with a prompt a line.

    Args:
        path: the file, or the folder in which it lies.
        subjects: names of some of them, in the order wanted; None: all.

    Raises:
        UserError: no such file, or one that is laid out otherwise; an unknown name; a subject without photos; a prompt
            that has not one {}.
    """
    file = find(path)
    file = file / DATASET if file.is_dir() else file
    entries = _entries(file)
    found = []
    for name in _chosen(list(entries), subjects, str(file)):
        entry = entries[name]
        prompts = _prompts(file.parent / entry["prompt_filename"])
        photos = _photos(file.parent / entry["instance_data_dir"], name)
        found.append(BenchmarkSubject(name, entry["class_prompt"].strip(), photos, prompts))
    return found


def _chosen(known: list[str], wanted: Sequence[str] | None, where: str) -> list[str]:
    names = known if wanted is None else list(wanted)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{where} has no subject `{unknown[0]}`{suggestion(unknown[0], known)}")
    if double := [name for name in names if names.count(name) > 1]:
        raise UserError(f"the subject {double[0]} is named twice")
    return names


def _photos(folder: Path, name: str) -> Path:
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"{name}: there is no photo in {folder}; fetch them, or name other subjects")
    return folder


def _entries(file: Path) -> dict[str, dict[str, str]]:
    """Subjects of a dataset.json by name."""
    try:
        entries = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file}: a list of subjects is wanted, as in CustomConcept101's {DATASET}")
    found: dict[str, dict[str, str]] = {}
    for place, entry in enumerate(entries):
        for key in FIELDS:
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{file}: [{place}] has no `{key}`, as every subject of {DATASET} has")
            path = PurePosixPath(value)
            if not value.isprintable() or (key != FIELDS[0] and (path.is_absolute() or ".." in path.parts)):
                raise UserError(f"{file}: [{place}] has the `{key}` {value[:80]!r}, which is no name beside {DATASET}")
        name = PurePosixPath(entry["instance_data_dir"]).name
        if name in found:
            raise UserError(f"{file}: [{place}] is a second subject called {name}")
        found[name] = entry
    return found


def _prompts(file: Path) -> tuple[str, ...]:
    prompts = tuple(dict.fromkeys(line for _, line in numbered_lines(read_text(file))))
    if not prompts:
        raise UserError(f"{file}: holds no prompt")
    if odd := [prompt for prompt in prompts if prompt.count("{}") != 1]:
        raise UserError(f"{file}: the prompt {odd[0]!r} has not one {{}} for the concept")
    return prompts
