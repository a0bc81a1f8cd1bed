"""ClassDiffusion: the concept's sentence stays where the superclass's is (Huang et al. 2024, arXiv 2405.17532).

From the authors' code: `1 − cos(pooled("a photo of a V* c"), pooled("a photo of a c"))`, with weight 1, beside Custom
Diffusion; neither side is detached. Their pooling takes the state at the largest token id, which with SD 1.5's config
is the new word itself, before the superclass has been read (`pooling: argmax`); what the paper describes is the state
at the end token (`pooling: end`).
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from infusion.methods.base import Method, Tensors
from infusion.regularisers.base import Regulariser, Step, check_reads
from infusion.sampling.encode import Words, each, encode
from infusion.tokens import Word, fill
from ldm.pipeline import StableDiffusion
from ldm.util.templates import check_template


class ClassSemantics(Regulariser):
    """`1 − cos` of the two sentences' pooled encodings; 0 where they are the same.

    Args:
        weight: λ.
        pooling: the place of the state that stands for a sentence: "end" token, or "argmax" of the token ids.
        template: the sentence, with {} for the concept.
    """

    def __init__(
        self, weight: float = 1.0, pooling: Literal["end", "argmax"] = "end", template: str = "a photo of a {}"
    ) -> None:
        super().__init__(weight)
        check_template("template", template)
        self.pooling, self.template = pooling, template

    def start(self, sd: StableDiffusion, method: Method, tensors: Tensors, word: Word) -> None:
        """Raises ValueError for a method whose sentence nothing that it learns can change."""
        check_reads(method, tensors)
        self.superclass = word.superclass

    def term(self, sd: StableDiffusion, method: Method, tensors: Tensors, step: Step) -> Tensor:
        learned = method.tokens(tensors)
        own = self.pooled(sd, method.noun(self.superclass), learned)
        return 1 - F.cosine_similarity(own, self.pooled(sd, self.superclass, None), dim=0)

    def pooled(self, sd: StableDiffusion, noun: str, learned: Words | None) -> Tensor:
        """The encoding (D,) that stands for the template's sentence with a noun."""
        context, places = encode(sd.text, [self.template], [noun], [learned])  # places (1, 1, L)
        if self.pooling == "argmax" and learned is not None:  # new words have the largest ids
            place = int(places[0, 0].nonzero()[: len(each(learned)[0])].max())
        else:
            ids = sd.text.tokenizer([fill(self.template, [noun])])[0]
            place = int((ids == sd.text.tokenizer.eos).nonzero()[0])
        return context.text[0, place].float()
