"""What the trainings of an experiment read in words: captions, nouns, templates and prompts.

The checks are those that a training makes before its first step. Here they come before any task, and need a tokenizer
instead of weights.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

import scripts.metrics as metrics
from data.captions import Caption, caption_warnings, captions_of
from data.photos import PhotoFolder
from infusion.metrics.run.protocol import Protocol, usual_file
from infusion.training.words import check_caption, check_samples, check_training_words
from ldm.models.tokenizer import Tokenizer
from ldm.util.cli import naming
from ldm.util.config import instantiate
from ldm.util.templates import bare

if TYPE_CHECKING:
    from scripts.experiments.config import Subject, Variant


def tokenizer_of(text: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a text encoder's node; of a pair's, that of the first, which reads prompts."""
    params = text["params"]
    return instantiate(params["tokenizer"]) if "tokenizer" in params else tokenizer_of(params["first"])


class Reader:
    """Reads texts as the trainings of one config do.

    Args:
        config: as for `main.py`, of any subject.
    """

    def __init__(self, config: DictConfig) -> None:
        nodes = OmegaConf.to_container(config)
        self.model, self.prior = nodes["model"]["params"], nodes["data"]["params"].get("prior")
        self.tokenizer = tokenizer_of(self.model["sd"]["params"]["text"])
        self.method = instantiate(self.model["method"], "model.params.method")
        self.regularisers = instantiate(self.model.get("regularisers") or {}, "model.params.regularisers")
        self.callbacks = {name: node for name, node in (nodes.get("callbacks") or {}).items() if node is not None}

    def check(self, superclass: str, captions: Sequence[Caption]) -> list[str]:
        """A line for each kind of caption that is not read as it stands.

        Raises:
            UserError: a text that cannot be read; the message has file and line, or the key.
        """
        superclass = bare(superclass)
        noun = self.method.noun(superclass)
        check_training_words(self.tokenizer, superclass, noun, self.model["templates"])
        for caption in captions:
            with naming(caption.place):
                check_caption(self.tokenizer, caption.template, noun)
        for name, term in self.regularisers.items():
            if term is not None:
                with naming(f"regularisers.{name}"):
                    term.check_texts(self.tokenizer, noun)
        for name, node in self.callbacks.items():
            with naming(f"callbacks.{name}: prompts"):
                check_samples(self.tokenizer, node.get("params", {}).get("prompts", ()), noun)
        if self.prior is not None:
            prior = self.prior | {"params": self.prior["params"] | {"superclass": superclass}}
            instantiate(prior, "data.params.prior").check_prompt(self.tokenizer)
        return caption_warnings(captions, superclass, noun, self.tokenizer)


def check_words(
    trainings: "Sequence[tuple[Variant, Sequence[Subject], DictConfig]]",
    folders: Mapping[str, PhotoFolder],
    measure: Mapping[str, Any] | None,
) -> list[str]:
    """What is to be told of captions, each line once.

    Args:
        trainings: variants with subjects, and the config that their trainings have but for photos and noun.
        folders: of the subjects' photos, by their names.
        measure: flags of `scripts/metrics.py`; None measures nothing.

    Raises:
        UserError: a text that cannot be read, as `Reader.check`, or a prompt of a measurement; variant and subject are
            named.
    """
    found = []
    for variant, subjects, config in trainings:
        reader = Reader(config)
        for subject in subjects:
            with naming(f"variants.{variant.name}: subjects.{subject.name}"):
                captions = captions_of(folders[subject.name], bare(subject.superclass))
                found += reader.check(subject.superclass, list(chain.from_iterable(captions)))
                if measure is not None:
                    name = subject.protocol or measure.get("protocol") or usual_file(config.sd.params.name)
                    with naming(str(name)):
                        metrics.check_texts(reader.tokenizer, Protocol.load(name), subject.superclass, subject.words)
    return list(dict.fromkeys(found))
