"""Where a concept sits in a tokenized prompt: found in the tokenizer's own ids, never by counting words."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from ldm.util.cli import UserError
from ldm.util.templates import PLACEHOLDER, fill, filled_parts, placeholders, short

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Word:
    """A word in its training prompts: what a concept's target input is averaged over.

    Attributes:
        superclass: the noun in place of {}.
        templates: the training prompts, with {} for the concept.
    """

    superclass: str
    templates: tuple[str, ...]


def concept_mask(tokenizer: "Tokenizer", template: str, noun: str) -> tuple[str, "Tensor"]:
    """`concept_places` of one concept: the prompt, and a bool mask (L,), True on the concept's tokens."""
    prompt, places = concept_places(tokenizer, template, [noun])
    return prompt, places[0] >= 0


def concept_places(
    tokenizer: "Tokenizer", template: str, nouns: Sequence[str], whole: bool = False
) -> tuple[str, "Tensor"]:
    """Put each concept's noun into a template, as `fill` does, and find its tokens.

    Every occurrence of a placeholder is the concept; the same noun written out in the template is not. A noun
    may be several tokens. A placeholder that is cut off at the tokenizer's length keeps what remains.

    Args:
        tokenizer: as in `ldm.models.tokenizer`; L is its context length, counting the begin and the end token.
        template: "{}" stands for the only concept; "{1}", "{2}" … for several.
        nouns: what stands in a prompt for each of K concepts.
        whole: the ids are those of `Tokenizer.windows`, n rows of L one behind the other, and nothing is cut.

    Returns:
        The prompt with the nouns filled in, and int64 (K, L), or (K, n·L): j on the j-th token of the concept's noun,
        counted from 0, and -1 elsewhere.

    Raises:
        ValueError: no noun or an empty noun; a placeholder of no concept; a placeholder glued to letters, so that
            its noun is no token of its own; a concept of which nothing is left after truncation.
    """
    import torch  # not above: what reads words alone, such as prompts, should not wait for it

    if not nouns:
        raise UserError("there is no concept to put into the template: give at least one noun")
    nouns_ids = [tokenizer.encode(noun) for noun in nouns]
    for noun, ids in zip(nouns, nouns_ids, strict=True):
        if not ids:
            raise UserError(f"the concept's noun {short(noun)} has no tokens: give a word such as 'cat'")

    prompt, parts = fill(template, nouns), filled_parts(template, nouns)
    row, ids = (tokenizer.windows([prompt]) if whole else tokenizer([prompt]))[0], tokenizer.encode(prompt)
    inner = tokenizer.context_length - 2
    read = len(row) // tokenizer.context_length * inner  # tokens of the prompt
    places = torch.full((len(nouns), len(row)), -1)
    found = islice(placeholders(template, len(nouns)), read)  # those behind lie beyond what is read
    for index, (match, concept) in enumerate(found):
        before, own = tokenizer.encode("".join(parts[: 2 * index + 1])), nouns_ids[concept]
        start, stop = len(before), len(before) + len(own)
        if ids[: min(stop, read)] != (before + own)[:read]:
            raise UserError(
                f"{match.group()} in {short(template)} is glued to its neighbours: {short(nouns[concept])} is not a "
                f"word of its own in {short(prompt)}. Put spaces around {match.group()}."
            )
        token = torch.arange(start, max(start, min(stop, read)))
        # each window has a begin and an end token of its own
        places[concept, token // inner * (inner + 2) + 1 + token % inner] = token - start
    for match, concept in placeholders(template, len(nouns)):
        if (places[concept] < 0).all():
            raise UserError(
                f"{match.group()} in {short(template)} lies wholly beyond the {read} tokens that are read: shorten the "
                f"text, or move the concept forward; {short(tokenizer.beyond(prompt))} is beyond"
            )
    return prompt, places


def word_pattern(word: str) -> re.Pattern[str]:
    """Finds a word, or words with blanks between them, that stand by themselves; capitals do not matter."""
    parts = r"\s+".join(map(re.escape, word.split()))
    return re.compile(rf"(?<!\w){parts}(?!\w)", re.IGNORECASE)


def point(prompt: str, words: Sequence[str]) -> str:
    """Put placeholders where a prompt has these words already, the k-th concept's at words[k].

    Of a word that several concepts have, each takes the next occurrence; "a cat beside a cat" with ["cat", "cat"]
    becomes "a {1} beside a {2}". Capitals do not matter.

    Raises:
        ValueError: the prompt has placeholders of its own, or lacks a word.
    """
    if found := PLACEHOLDER.search(prompt):
        raise UserError(
            f"{found[0][:20]} in {short(prompt)}: name the concept by a placeholder or by a word, not by both"
        )
    places: list[tuple[int, int]] = []
    for word in words:
        spans = (match.span() for match in word_pattern(word).finditer(prompt))
        free = (span for span in spans if all(span[1] <= start or span[0] >= end for start, end in places))
        place = next(free, None)
        if not word.strip() or place is None:
            raise UserError(f"the prompt {short(prompt)} has no word {short(word)} for the concept")
        places.append(place)
    for number, (start, end) in sorted(enumerate(places, 1), key=lambda item: item[1], reverse=True):
        prompt = f"{prompt[:start]}{{{number if len(words) > 1 else ''}}}{prompt[end:]}"
    return prompt
