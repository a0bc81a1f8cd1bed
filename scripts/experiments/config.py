"""What an experiment's config says (docs/experiments.md): subjects, variants, seeds, and what is measured."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import data.soft_segment as soft_segment
import main as training
import scripts.metrics as metrics
from data.photos import PhotoFolder
from infusion.concepts.base import check_there
from infusion.metrics.run.protocol import KEYS, Protocol
from infusion.metrics.run.subjects import BenchmarkSubject, read
from ldm.training.config import check_inputs, check_nodes, read_config
from ldm.util.cli import UserError, naming, suggestion
from ldm.util.config import ConfigError, check_params, find, load_config
from ldm.util.defaults import POCKET
from ldm.util.files import write

POCKET_TWO = "pocket_two"
NETWORKS = ("clip", "clipseg", "dino", "dinov2", "identity", "lpips", "covariance")  # files and folders of `measure`
FILLED_IN = ("personalized_ckpt", "labels", "groups", "images", "out", "cache")  # its flags that each row has
NAME = re.compile(r"[\w.+-][\w .+-]*")  # of subjects and variants: parts of paths, and of lists with commas


@dataclass(frozen=True)
class Subject:
    """A concept to learn.

    Attributes:
        folder: of its photos. superclass: its noun. protocol: file of prompts; "" is the base model's usual one.
        words: how it is best told in words; "" where nobody said. overrides: of its trainings.
    """

    name: str
    folder: str
    superclass: str
    protocol: str = ""
    words: str = ""
    overrides: list[str] = field(default_factory=list, hash=False)


@dataclass(frozen=True)
class Variant:
    """What is compared. `{subject}` in a path from elsewhere is the subject's name.

    Attributes:
        config: files as for `main.py --base`, with `overrides`. seeds: its own; [] takes the experiment's.
        step: of the training, which is measured: a number, `best` (configs/with/best.yaml), or "" for the last.
        file: instead, a concept file or run folder that is there. pictures: instead, a folder of pictures.
    """

    name: str
    config: list[str] = field(default_factory=list, hash=False)
    overrides: list[str] = field(default_factory=list, hash=False)
    seeds: list[int] = field(default_factory=list, hash=False)
    step: str | list[str] = ""  # a list in a config is a variant of each
    file: str = ""
    pictures: str = ""

    @property
    def like(self) -> str:
        """What takes as long."""
        return ",".join(self.config) or self.name

    def place(self, subject: Subject) -> str:
        """Where what was made elsewhere lies."""
        return (self.file or self.pictures).replace("{subject}", subject.name)


@dataclass(frozen=True)
class Experiment:
    """Subjects × variants × seeds.

    Attributes:
        masks: flags of `data/soft_segment.py`; None takes the masks that lie beside the photos.
        measure: flags of `scripts/metrics.py`; None measures nothing.
        cores, gpus: of each task; gpus None is 1 where there is a GPU.
    """

    name: str
    subjects: Sequence[Subject]
    variants: Sequence[Variant]
    seeds: list[int] = field(default_factory=lambda: [0])
    masks: dict[str, Any] | None = None
    measure: dict[str, Any] | None = field(default_factory=dict)
    cores: int = 1
    gpus: float | None = None

    def runs(self) -> list[tuple[Variant, Subject, int | None]]:
        """What is trained or taken from elsewhere, which has no seed."""
        return [
            (variant, subject, seed)
            for variant in self.variants
            for subject in self.subjects
            for seed in (variant.seeds or self.seeds if variant.config else (None,))
        ]

    def only(self, names: Sequence[str]) -> "Experiment":
        """Of these variants and these subjects; where none of a kind is named, of all."""
        known = [one.name for one in (*self.variants, *self.subjects)]
        for name in names:
            if name not in known:
                raise UserError(f"--only: there is no variant or subject `{name}`{suggestion(name, known)}")
        variants = [one for one in self.variants if one.name in names] or self.variants
        subjects = [one for one in self.subjects if one.name in names] or self.subjects
        return replace(self, variants=variants, subjects=subjects)


def arguments(variant: Variant, subject: Subject, seed: int, data_root: str | Path) -> list[str]:
    """The arguments of main.py that describe a training."""
    words = [f"superclass={subject.superclass}", f"data_root={data_root}", f"seed={seed}"]
    return ["--base", *variant.config, *words, *subject.overrides, *variant.overrides]


def step_file(variant: Variant, config: DictConfig) -> str:
    """The concept file of a variant's step, in its run folder; "" for the folder itself, which stands for the last.

    Raises:
        UserError: the training does not keep that step.
    """
    if variant.step in ("", "best"):
        if variant.step and not OmegaConf.select(config, "callbacks.best"):
            raise UserError("step: no best step is marked: add configs/with/best.yaml to config")
        return variant.step and "models/best.safetensors"
    every = OmegaConf.select(config, "callbacks.concept.params.every", default=0)
    kept = range(every, config.trainer.get("max_steps", 0) + 1, every) if every else ()
    if not variant.step.isdecimal() or int(variant.step) not in kept:
        raise UserError(f"step: `best` or a multiple of callbacks.concept.params.every ({every}), not {variant.step}")
    return f"models/step={int(variant.step):06d}.safetensors"


def as_flags(flags: Mapping[str, Any]) -> list[str]:
    """A mapping as a command's flags: {clip: pocket, metrics: [lfd, w2]} -> --clip pocket --metrics lfd,w2."""
    found = []
    for name, value in flags.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        found += [f"--{name}"] if value is True else [f"--{name}", text]
    return found


def read_experiment(path: str, overrides: Sequence[str], protocols: Path) -> Experiment:
    """A config, checked: what it names is there, and every variant's training can be built.

    Args:
        protocols: folder that gets the protocols of a benchmark's subjects that have prompts of their own.

    Raises:
        UserError: a mistake, which the message names.
    """
    usual = {"subjects": {}, "variants": {}, "base": []}
    usual |= {"seeds": [0], "masks": None, "measure": {}, "cores": 1, "gpus": None}
    values = OmegaConf.to_container(load_config(find(path), overrides, usual, Experiment), resolve=True)
    with naming(path):
        for key in ("subjects", "variants"):
            if not isinstance(values[key], dict) or not values[key]:
                raise ConfigError(f"{key}: a mapping of names is wanted")
        values |= {
            "name": Path(path).stem,
            "subjects": read_subjects(values["subjects"], protocols),
            "variants": read_variants(values["variants"], values.pop("base")),
        }
        check_params(Experiment, values, "")
        experiment = Experiment(**values)
        check(experiment)
    return experiment


def read_subjects(said: dict[str, Any], protocols: Path) -> list[Subject]:
    """`from:` and `names:` take subjects of a pocket world or benchmark; other keys are subjects, or amend these."""
    said = dict(said)
    source, names = said.pop("from", None), said.pop("names", None)
    found = {one.name: one for one in known_subjects(source, names, protocols)} if source else {}
    for name, own in said.items():
        values = (vars(found[name]) if name in found else {"name": name}) | (own if isinstance(own, dict) else {})
        check_params(Subject, values, f"subjects.{name}")
        found[name] = Subject(**values)
    return list(found.values())


def known_subjects(source: str, names: Sequence[str] | None, protocols: Path) -> list[Subject]:
    """Concepts of a pocket world, or subjects of a benchmark."""
    if source not in (POCKET, POCKET_TWO):
        with naming("subjects.from"):
            listed = read(source, names)
        return [Subject(s.name, str(s.photos), s.superclass, protocol_file(s, protocols)) for s in listed]
    if source == POCKET:
        from data.pocket.scene import CONCEPTS

        nouns = usual = {name: one.noun for name, one in CONCEPTS.items()}
    else:
        from data.pocket_two.concepts import COMPARED, CONCEPTS

        nouns, usual = {name: one.thing.noun for name, one in CONCEPTS.items()}, COMPARED
    chosen = list(usual) if names is None else names
    if odd := [name for name in chosen if name not in nouns]:
        raise ConfigError(f"subjects.names: there is no `{odd[0]}`{suggestion(odd[0], list(nouns))}")
    return [Subject(name, f"data/{source}/concepts/{name}", nouns[name]) for name in chosen]


def protocol_file(subject: BenchmarkSubject, folder: Path) -> str:
    """The shipped file with a subject's prompts, or one that is written; a file with other contents is left alone."""
    if subject.protocol:
        return subject.protocol
    content, path = subject.as_protocol().as_dict(), folder / f"{subject.name}.yaml"
    text = OmegaConf.to_yaml({key: content[key] for key in KEYS})
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path} exists already, with other prompts; name another folder by --out")
    write(path, text.encode())
    return str(path)


def read_variants(said: dict[str, Any], base: str | list[str]) -> list[Variant]:
    """A config file, a list of these, or a mapping, in which `trials:` stands for a variant of each combination of the
    values of some keys, and a list of `step` for one of each. `base` comes after every variant's own config."""
    found = []
    for name, own in said.items():
        values = (dict(own) if isinstance(own, dict) else {"config": own}) | {"name": name}
        trials, steps = values.pop("trials", {}), values.pop("step", "")
        named = isinstance(steps, list)
        if values.get("config"):
            values["config"] = [*as_list(values["config"]), *as_list(base)]
        check_params(Variant, values, f"variants.{name}")
        if sum(bool(values.get(kind)) for kind in ("config", "file", "pictures")) != 1:
            raise ConfigError(f"variants.{name}: give one of config, file and pictures")
        if not isinstance(trials, dict) or not all(isinstance(tried, list) for tried in trials.values()):
            raise ConfigError(f"variants.{name}.trials: a mapping of keys to lists of values is wanted")
        for *chosen, step in product(*trials.values(), as_list(steps)):
            words = [f"{key}={value}" for key, value in zip(trials, chosen, strict=True)]
            said = [name, *chosen, *([step] if named else [])]
            one = {"name": " ".join(map(str, said)), "overrides": [*values.get("overrides", []), *words]}
            found.append(Variant(**values | one, step=str(step)))
    return found


def as_list(said: Any) -> list:
    return said if isinstance(said, list) else [said]


def alike(subjects: Sequence[Subject]) -> list[list[Subject]]:
    """Subjects whose trainings differ in nothing but their photos and their noun, together."""
    found: dict[tuple[str, ...], list[Subject]] = {}
    for subject in subjects:
        found.setdefault(tuple(subject.overrides), []).append(subject)
    return list(found.values())


def check(experiment: Experiment) -> None:
    """Raises UserError for a mistake that would otherwise end a task hours later."""
    for one in (*experiment.subjects, *experiment.variants):
        if not NAME.fullmatch(one.name):
            raise ConfigError(f"{one.name}: a name has letters, digits, spaces and . + - _ only")
        if isinstance(one, Variant) and len(set(one.seeds)) < len(one.seeds):
            raise ConfigError(f"variants.{one.name}.seeds: the same seed twice")
    if experiment.cores < 1 or not experiment.seeds or len(set(experiment.seeds)) < len(experiment.seeds):
        raise ConfigError("cores must be at least 1, and seeds are one or more different numbers")
    if len({bool(subject.protocol) for subject in experiment.subjects}) > 1:
        raise ConfigError("subjects: give all of them a protocol, or none")
    folders = {}
    for subject in experiment.subjects:
        there = folders[subject.name] = PhotoFolder.read(subject.folder, f"subjects.{subject.name}.folder")
        if there.left_out:
            print(f"warning: {there.root}: left out: {there.lacks()}", file=sys.stderr)
        if subject.protocol:
            Protocol.load(subject.protocol)
    first, trainings = experiment.subjects[0], []
    for variant in experiment.variants:
        with naming(f"variants.{variant.name}"):
            for subjects in alike(experiment.subjects) if variant.config else ():
                data_root = find(subjects[0].folder)
                config = read_config(training.parse(arguments(variant, subjects[0], experiment.seeds[0], data_root)))
                check_inputs(config)
                check_nodes(config)
                step_file(variant, config)
                trainings.append((variant, subjects, config))
            for subject in () if variant.config else experiment.subjects:
                check_there("file" if variant.file else "pictures", variant.place(subject))
    if experiment.masks is not None:
        with naming("masks"):
            needed = ["--image_dir", first.folder, "--super_class", first.superclass]
            network = soft_segment.parse([*needed, *as_flags(experiment.masks)]).model_weight
            check_there("model_weight", None if network == POCKET else network)
    if experiment.measure is not None:
        with naming("measure"):
            if own := [name for name in FILLED_IN if name in experiment.measure]:
                raise ConfigError(f"{own[0]}: each row has its own; leave it out")
            flags = dict(experiment.measure)
            flags |= {"described": first.words} if first.words else {}
            drawn = any(variant.pictures for variant in experiment.variants)
            if drawn and ("config" not in flags or len({one.superclass for one in experiment.subjects}) > 1):
                raise ConfigError("with pictures: name the base model by `config`, and take subjects of one superclass")
            flags |= {"pictures": "a=b", "superclass": first.superclass} if drawn else {}
            metrics.parse(["--personalized_ckpt", "any", *as_flags(flags)])
            for name in NETWORKS:
                check_there(name, None if flags.get(name) == POCKET else flags.get(name))
    from scripts.experiments.words import check_words  # not above: it takes seconds

    for warning in check_words(trainings, folders, experiment.measure):
        print(f"warning: {warning}", file=sys.stderr)
