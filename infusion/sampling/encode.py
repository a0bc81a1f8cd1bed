"""Prompts with concepts in them, as the UNet reads them: text encodings, and where each concept sits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from infusion.tokens import concept_places
from ldm.models.attention import Context
from ldm.models.text import TextEncoder
from ldm.util.cli import UserError

Words = Tensor | Mapping[str, Tensor]  # learned input embeddings, (T, D); or such for each spatial transformer


def encode(
    text: TextEncoder,
    templates: Sequence[str],
    nouns: Sequence[str],
    learned: Sequence[Words | None] | None = None,
    whole: bool = False,
) -> tuple[Context, Tensor]:
    """Encode templates, with learned input embeddings in place of the first tokens of the concepts' nouns.

    Args:
        text: the text encoder.
        templates: B prompts with placeholders.
        nouns: what stands in them for each of K concepts.
        learned: for each concept (T, D), the embeddings of its noun's first T tokens; None keeps the vocabulary's.
            Where a concept has some for each transformer, prompts with a concept are encoded as often, and what is no
            layer reads the mean.
        whole: long prompts are read in windows, n of them; in training what is beyond the first is cut.

    Returns:
        B rows for the UNet, with gradients to what is learned, and bool masks (B, K, L), or (B, K, n·L), of the
        concepts' tokens.

    Raises:
        ValueError: embeddings of another width, or a placeholder that is no word of its own or of no concept.
    """
    tokens, rows, masks = token_ids(text, templates, nouns, learned, whole)
    if not isinstance(rows, Mapping):
        return text.context(tokens, rows), masks
    if not masks.any():
        return text.context(tokens), masks
    count = len(tokens)
    which = torch.arange(len(rows)).repeat_interleave(count)  # (W · B,)
    every = text.context(*choose(text, tokens.repeat(len(rows), 1), rows, which))
    texts = dict(zip(rows, every.text.split(count), strict=True))
    mean = replace(every, attended=None).map(lambda own: own.unflatten(0, (-1, count)).mean(0))
    return replace(mean, attended=None if every.attended is None else every.attended[:count], texts=texts), masks


def token_ids(
    text: TextEncoder,
    templates: Sequence[str],
    nouns: Sequence[str],
    learned: Sequence[Words | None] | None = None,
    whole: bool = False,
) -> tuple[Tensor, Words | None, Tensor]:
    """What `encode` has the text encoder read, as `encode_tokens` takes it; arguments and errors as there.

    Returns:
        Ids (B, L) int64, of which those beyond the vocabulary's are of learned rows; these rows, (T, D), or None, or
        where some concept has words for each transformer such rows for each (`choose`); and the masks (B, K, L).
    """
    tokenizer = text.tokenizer
    found = (concept_places(tokenizer, template, nouns, whole) for template in templates)
    prompts, places = zip(*found, strict=True)
    places = pad_sequence([own.mT for own in places], batch_first=True, padding_value=-1).mT  # (B, K, L)
    given = [(k, rows) for k, rows in enumerate(learned or ()) if rows is not None]
    tokens = tokenizer.windows(prompts) if whole else tokenizer(list(prompts))  # (B, L)
    first = text.vocab_size  # of the ids beyond the vocabulary's
    if not given:
        return tokens, None, places >= 0
    for k, words in given:
        for rows in each(words):
            if rows.dim() != 2 or rows.shape[1] != text.width:
                raise UserError(f"a word learned as {tuple(rows.shape)} does not fit embeddings {text.width} wide")
        count = len(each(words)[0])
        replaced = (places[:, k] >= 0) & (places[:, k] < count)
        tokens = torch.where(replaced, first + places[:, k], tokens)
        first += count
    device = next(text.parameters()).device

    def stacked(name: str | None) -> Tensor:
        rows = (words[name] if isinstance(words, Mapping) else words for _, words in given)
        return torch.cat([own.to(device) for own in rows])

    names = next((list(words) for _, words in given if isinstance(words, Mapping)), [])
    return tokens, {name: stacked(name) for name in names} or stacked(None), places >= 0


def choose(text: TextEncoder, tokens: Tensor, rows: Mapping[str, Tensor], which: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and rows as of `token_ids`, for prompts that each have the words of one transformer, the `which`-th, (B,)."""
    first = which[:, None] * len(each(rows)[0])
    return torch.where(tokens >= text.vocab_size, tokens + first, tokens), torch.cat(each(rows))


def each(words: Words) -> list[Tensor]:
    """All that there are of learned words, in the order of the UNet: (T, D) each."""
    return list(words.values()) if isinstance(words, Mapping) else [words]


def own_embeddings(text: TextEncoder, words: str) -> Tensor:
    """The vocabulary's input embeddings of some words, (T, D), as float32."""
    return text.embed(torch.tensor(text.tokenizer.encode(words))).detach().float()
