"""Which prompts a measurement is made on: a YAML file, in `configs/protocol/`.

| key | prompts | what they are for |
|---|---|---|
| `concept` | with {} for the concept | samples of the concept, and LFD outside its region |
| `none` | without any word of the concept | LFD and drift |
| `superclass` | with {superclass}, the plain noun | LFD, drift and PRES |
| `neighbours` | with {neighbour}, nouns beside the superclass | LFD and drift |

`kin` lists rows of nouns that are each other's neighbours, and `others` those of a superclass that is in none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import Self

from omegaconf import OmegaConf

from ldm.util.cli import UserError, naming, suggestion
from ldm.util.config import ROOT, ConfigError, find, load_config
from ldm.util.templates import PLACEHOLDER, fill

FOLDER = Path("configs/protocol")
CONTEXT = "context"
PLAIN = ("none", "superclass", "neighbours")  # the groups whose prompts do not name the concept
GROUPS = (*PLAIN, CONTEXT)
KEYS = ("concept", *PLAIN, "kin", "others")
SUPERCLASS, NEIGHBOUR = "{superclass}", "{neighbour}"
WANTED = {"concept": "{}", "superclass": SUPERCLASS, "neighbours": NEIGHBOUR}  # in every prompt of a key


@dataclass(frozen=True)
class Protocol:
    """Prompts before a superclass is filled in; the attributes are the file's keys.

    Attributes:
        nouns: neighbours of every superclass; () takes those of `kin` or `others`.

    Raises:
        ValueError: a key without prompts, a prompt that lacks its word, or one that has a placeholder of another key.
    """

    concept: tuple[str, ...] = ()
    none: tuple[str, ...] = ()
    superclass: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    kin: tuple[tuple[str, ...], ...] = ()
    others: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("concept", *PLAIN):
            prompts, wanted = getattr(self, key), WANTED.get(key)
            if not prompts:
                raise ConfigError(f"{key}: at least one prompt is wanted")
            for prompt in prompts:
                if wanted and wanted not in prompt:
                    raise ConfigError(f"{key}: {prompt!r} has no {wanted}")
                odd = {SUPERCLASS, NEIGHBOUR, "{}"} - {wanted}
                if found := next((word for word in sorted(odd) if word in prompt), None):
                    raise ConfigError(f"{key}: {prompt!r} has a {found}, which is for other prompts")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A file; raises UserError, which names it, for a missing one, an unknown key, or whatever the class does."""
        config = OmegaConf.to_container(load_config(find(path)))
        with naming(str(path)):
            for key, value in config.items():
                if key not in KEYS:
                    raise ConfigError(f"unknown key `{key}`{suggestion(str(key), list(KEYS))}")
                rows = value if key == "kin" and isinstance(value, list) else [value]
                words = [one for row in rows for one in (row if isinstance(row, list) else [None])]
                if not all(isinstance(word, str) and word.strip() for word in words):
                    raise ConfigError(f"{key}: a list of {'lists of words' if key == 'kin' else 'texts'} is wanted")
            rows = tuple(tuple(row) for row in config.pop("kin", []))
            return cls(kin=rows, **{key: tuple(value) for key, value in config.items()})

    @classmethod
    def of(cls, architecture: str) -> Self:
        """The usual one of an architecture, such as "sd15"; see `usual_file`."""
        return cls.load(usual_file(architecture))

    def as_dict(self) -> dict[str, object]:
        """The file's keys, for JSON."""
        return {key: [list(row) for row in value] if key == "kin" else list(value) for key, value in vars(self).items()}

    def beside(self, nouns: Sequence[str]) -> Self:
        """The protocol with these neighbours, whatever the superclass."""
        return replace(self, nouns=tuple(nouns))

    def neighbours_of(self, superclass: str) -> tuple[str, ...]:
        """Nouns beside a superclass; raises ValueError where there are none."""
        row = next((row for row in self.kin if superclass in row), self.others)
        nouns = tuple(noun for noun in self.nouns or row if noun != superclass)
        if not nouns:
            raise UserError(f"--neighbours: name nouns beside {superclass!r}; the protocol has none for it")
        return nouns

    def prompts(self, group: str, superclass: str) -> list[str]:
        """A group's prompts; those of `context` have {} for the concept.

        Neighbours and prompts go round together, so that the first few have many of both.
        """
        if group == CONTEXT:
            return list(self.concept)
        if group == "none":
            return list(self.none)
        word, templates = WANTED[group], getattr(self, group)
        nouns = (superclass,) if group == "superclass" else self.neighbours_of(superclass)
        pairs = range(lcm(len(templates), len(nouns)))
        filled = [(templates[i % len(templates)], nouns[i % len(nouns)]) for i in pairs]
        return [fill(template.replace(word, "{}"), [noun]) for template, noun in filled]


def usual_file(architecture: str) -> Path:
    """Of the usual protocol of an architecture, within the repository."""
    own = FOLDER / f"{architecture}.yaml"
    return own if (ROOT / own).is_file() else FOLDER / "stable_diffusion.yaml"


def plain(prompt: str, superclass: str) -> str:
    """The base model's version of a prompt: the superclass in place of {}."""
    return fill(prompt, [superclass]) if PLACEHOLDER.search(prompt) else prompt
