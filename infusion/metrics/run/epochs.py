"""Which of the measured files are epochs of one training, and in which order."""

import re
from collections.abc import Sequence
from dataclasses import replace
from math import inf

from infusion.metrics.run.subject import Subject, place_of


def as_epochs(subjects: Sequence[Subject]) -> list[Subject]:
    """Subjects, in the order given, with what is known of those that are epochs of one training.

    Epochs are files of one folder that have photos, method, base model and the settings of their training in common,
    and differ in steps. Where no file says its steps, the number at the end of the names orders them; a name without
    one is the last, as sd-scripts has it. Each is a group of its own where it was given none.
    """
    gathered: dict[tuple, list[Subject]] = {}
    for subject in subjects:
        if len(subject.checkpoints) == 1 and subject.last.file:
            gathered.setdefault(_training(subject), []).append(subject)
    found = {}
    for own in gathered.values():
        for i, one in enumerate(_in_order(own), 1):
            found[one.label] = replace(one, group=one.group or one.label, training=own[0].label, epoch=i)
    return [found.get(subject.label, subject) for subject in subjects]


def _training(subject: Subject) -> tuple:
    concept = subject.concept
    settings = concept.seed, concept.learning_rate, concept.numbers, str(dict(concept.options))
    return place_of(subject.last.file).parent, concept.method, concept.architecture, subject.name, *settings


def _in_order(subjects: Sequence[Subject]) -> list[Subject]:
    """Two or more in the order of their training; [] where that is not known."""
    steps = [subject.concept.steps for subject in subjects]
    names, numbers = zip(*(_numbered(place_of(subject.last.file).name) for subject in subjects), strict=True)
    known = steps if any(steps) else numbers if len(set(names)) == 1 else []
    if len(set(known)) < max(2, len(subjects)):
        return []
    return [subject for _, subject in sorted(zip(known, subjects, strict=True), key=lambda pair: pair[0])]


def _numbered(name: str) -> tuple[str, float]:
    """A name without the number at its end, and that number: "rex-000004" -> "rex", 4."""
    found = re.fullmatch(r"(.*?)[-_.= ]*(\d+)", name)
    return (found[1], int(found[2])) if found else (name, inf)
