"""Whether a training can read what it is given in words. The tokenizer alone is needed, no weights."""

from collections.abc import Sequence

from infusion.concepts.fields import check_words
from infusion.gate import training_prompts
from infusion.tokens import Word, concept_mask, concept_places
from ldm.models.tokenizer import Tokenizer
from ldm.util.cli import UserError
from ldm.util.templates import short


def check_training_words(tokenizer: Tokenizer, superclass: str, noun: str, templates: Sequence[str]) -> None:
    """Raises UserError for a superclass, noun or template that no concept file may say, or that is not read whole."""
    check_words(superclass, templates, noun)
    prompts, _ = training_prompts(tokenizer, Word(noun, tuple(templates)))
    for prompt in prompts:
        if beyond := tokenizer.beyond(prompt):
            raise UserError(f"templates: {short(prompt)} is too long for training: {short(beyond)} is beyond")


def check_caption(tokenizer: Tokenizer, caption: str, noun: str) -> None:
    """Raises UserError for a caption, with {}, in which training finds no concept; what it cuts behind is no error."""
    concept_mask(tokenizer, caption, noun)


def check_samples(tokenizer: Tokenizer, prompts: Sequence[str], noun: str) -> None:
    """Raises UserError for a prompt with {} that cannot be drawn whole."""
    for prompt in prompts:
        concept_places(tokenizer, prompt, [noun], whole=True)
