"""Custom Diffusion: keys, values and a word (Kumari et al. 2023, arXiv 2212.04488).

Its regularisation images are the node `prior` of `data.latents.ConceptData`.
"""

import torch
from torch import Tensor, nn

from infusion.inject import cross_attention_layers
from infusion.methods.base import TOKENS, RareWord, Tensors
from infusion.sampling.encode import own_embeddings
from infusion.tokens import Word
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError


class WithoutBegin(nn.Module):
    """Keys or values (B, L, C) through which the begin token, the first of L, gives no gradient."""

    def forward(self, text: Tensor, output: Tensor, timesteps: Tensor) -> Tensor:
        if not output.requires_grad:  # sampling: nothing to hold back, and no copy
            return output
        return torch.cat([output[:, :1].detach(), output[:, 1:]], 1)


class CustomDiffusion(RareWord):
    """A change of W_K and W_V in every cross-attention, and the input embedding of a rare word before the superclass.

    The begin token gives no gradient to them: that is in the authors' code and in diffusers' processor, not in the
    paper. The learned embedding starts from the identifier's own, so there must be one: without it, `start` raises
    ValueError.
    """

    name = "custom_diffusion"

    def start(self, sd: StableDiffusion, word: Word) -> dict[str, nn.Parameter]:
        if not sd.text.tokenizer.encode(self.identifier):
            raise UserError(f"identifier: {self.identifier!r} has no tokens: give a rare word such as 'sks'")
        learned = {TOKENS: nn.Parameter(own_embeddings(sd.text, self.identifier))}
        for name, layer in cross_attention_layers(sd.unet).items():
            for part in ("to_k", "to_v"):
                weight = getattr(layer, part).weight
                learned[f"{name}.{part}.weight"] = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        return learned

    def outputs(self, tensors: Tensors, strength: float = 1.0) -> dict[str, nn.Module]:
        read_text = (name for name in self.differences(tensors) if name.endswith((".to_k.weight", ".to_v.weight")))
        return {name.removesuffix(".weight"): WithoutBegin() for name in read_text}
