"""Infusion with a learned word: residual value embeddings, and the input embedding of the superclass word.

No publication has it. What regularises the word (`infusion.regularisers`) has no gradient to residual values, so it
takes this method to combine the two.
"""

import torch
from torch import Tensor, nn

from infusion.gate import mean_encoding
from infusion.methods.base import TOKENS, Tensors
from infusion.methods.infusion import Infusion
from infusion.sampling.encode import encode, own_embeddings
from infusion.tokens import Word
from ldm.pipeline import StableDiffusion


class InfusionWord(Infusion):
    """Infusion on the attention maps of a foundation that reads the learned word; arguments as of Infusion.

    The word gets its gradient through the foundation stream, which costs a second backward pass. The gate's target
    input is the mean encoding of the learned word.
    """

    name = "infusion_word"
    foundation_learns = True

    def start(self, sd: StableDiffusion, word: Word) -> dict[str, nn.Parameter]:
        return {TOKENS: nn.Parameter(own_embeddings(sd.text, word.superclass))} | super().start(sd, word)

    def terms(self, sd: StableDiffusion, tensors: Tensors, word: Word) -> list[dict[str, nn.Module]]:
        return super().terms(sd, {name: tensor for name, tensor in tensors.items() if name != TOKENS}, word)

    @torch.no_grad()
    def target(self, sd: StableDiffusion, tensors: Tensors, word: Word) -> Tensor:
        context, masks = encode(sd.text, word.templates, [word.superclass], [tensors[TOKENS]])
        encodings = sd.text.comparable(context.text)  # (B, L, D)
        return mean_encoding(encodings, masks[:, 0])
