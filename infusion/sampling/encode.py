"""Prompts with concepts in them, as the UNet reads them: text encodings, and where each concept sits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from infusion.tokens import concept_places
from ldm.models.text import ClipText, OpenClipText
from ldm.util.cli import UserError


def encode(
    text: ClipText | OpenClipText,
    templates: Sequence[str],
    nouns: Sequence[str],
    learned: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode templates, with learned input embeddings in place of the first tokens of the concepts' nouns.

    Args:
        text: the text encoder.
        templates: B prompts with placeholders.
        nouns: what stands in them for each of K concepts.
        learned: for each concept (T, D), the embeddings of its noun's first T tokens; None keeps the vocabulary's.

    Returns:
        Encodings (B, L, D), with gradients to what is learned, and bool masks (B, K, L) of the concepts' tokens.

    Raises:
        ValueError: embeddings of another width, or a placeholder that is no word of its own or of no concept.
    """
    prompts, places = zip(*(concept_places(text.tokenizer, template, nouns) for template in templates), strict=True)
    places = torch.stack(places)  # (B, K, L)
    given = [(k, rows) for k, rows in enumerate(learned or ()) if rows is not None]
    if not given:
        return text(list(prompts)), places >= 0
    tokens, first = text.tokenizer(list(prompts)), len(text.embeddings)  # (B, L); the ids beyond the vocabulary's
    for k, rows in given:
        if rows.shape[1:] != text.embeddings.shape[1:]:
            raise UserError(f"a word learned as {tuple(rows.shape)} does not fit embeddings {text.width} wide")
        replaced = (places[:, k] >= 0) & (places[:, k] < len(rows))
        tokens = torch.where(replaced, first + places[:, k], tokens)
        first += len(rows)
    device = text.embeddings.device
    return text.encode_tokens(tokens, torch.cat([rows.to(device) for _, rows in given])), places >= 0


def own_embeddings(text: ClipText | OpenClipText, words: str) -> Tensor:
    """The vocabulary's input embeddings of some words, (T, D), as float32."""
    ids = torch.tensor(text.tokenizer.encode(words), device=text.embeddings.device)
    return text.embeddings.detach()[ids].float()
