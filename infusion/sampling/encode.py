"""Prompts with concepts in them, as the UNet reads them: text encodings, and where each concept sits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from infusion.tokens import concept_places
from ldm.models.attention import Context
from ldm.models.text import TextEncoder
from ldm.util.cli import UserError


def encode(
    text: TextEncoder,
    templates: Sequence[str],
    nouns: Sequence[str],
    learned: Sequence[Tensor | None] | None = None,
) -> tuple[Context, Tensor]:
    """Encode templates, with learned input embeddings in place of the first tokens of the concepts' nouns.

    Args:
        text: the text encoder.
        templates: B prompts with placeholders.
        nouns: what stands in them for each of K concepts.
        learned: for each concept (T, D), the embeddings of its noun's first T tokens; None keeps the vocabulary's.

    Returns:
        B rows for the UNet, with gradients to what is learned, and bool masks (B, K, L) of the concepts' tokens.

    Raises:
        ValueError: embeddings of another width, or a placeholder that is no word of its own or of no concept.
    """
    tokens, rows, masks = token_ids(text, templates, nouns, learned)
    return text.context(tokens, rows), masks


def token_ids(
    text: TextEncoder,
    templates: Sequence[str],
    nouns: Sequence[str],
    learned: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What `encode` has the text encoder read, as `encode_tokens` takes it; arguments and errors as there.

    Returns:
        Ids (B, L) int64, of which those beyond the vocabulary's are of learned rows; these rows, (T, D), or None; and
        the masks (B, K, L).
    """
    prompts, places = zip(*(concept_places(text.tokenizer, template, nouns) for template in templates), strict=True)
    places = torch.stack(places)  # (B, K, L)
    given = [(k, rows) for k, rows in enumerate(learned or ()) if rows is not None]
    tokens, first = text.tokenizer(list(prompts)), text.vocab_size  # (B, L); the ids beyond the vocabulary's
    if not given:
        return tokens, None, places >= 0
    for k, rows in given:
        if rows.dim() != 2 or rows.shape[1] != text.width:
            raise UserError(f"a word learned as {tuple(rows.shape)} does not fit embeddings {text.width} wide")
        replaced = (places[:, k] >= 0) & (places[:, k] < len(rows))
        tokens = torch.where(replaced, first + places[:, k], tokens)
        first += len(rows)
    device = next(text.parameters()).device
    return tokens, torch.cat([rows.to(device) for _, rows in given]), places >= 0


def own_embeddings(text: TextEncoder, words: str) -> Tensor:
    """The vocabulary's input embeddings of some words, (T, D), as float32."""
    return text.embed(torch.tensor(text.tokenizer.encode(words))).detach().float()
