"""Textual Inversion: an input embedding for the concept's word, nothing else (Gal et al. 2022, arXiv 2208.01618)."""

from torch import nn

from infusion.methods.base import TOKENS, Method
from infusion.sampling.encode import own_embeddings
from infusion.tokens import Word
from ldm.pipeline import StableDiffusion


class TextualInversion(Method):
    """One learned vector for each token of the superclass word, which it takes the place of and starts from."""

    name = "textual_inversion"

    def start(self, sd: StableDiffusion, word: Word) -> dict[str, nn.Parameter]:
        return {TOKENS: nn.Parameter(own_embeddings(sd.text, word.superclass))}
