"""Directional Textual Inversion: a word of fixed norm, whose direction is drawn to the superclass's (arXiv 2512.13672).

From the paper (read in a summary): the norm is the vocabulary's mean, about 0.4 for CLIP, where Textual Inversion's
words grow to twenty and more; the direction is learned by Riemannian gradient descent, under a von Mises-Fisher prior
exp(κ μᵀv) around the superclass's direction μ. Our reading: the optimiser is the method's own, and behind each of its
steps the word is put back to the norm, which is the retraction of such a descent. SDXL's word has a norm and a
direction in each text encoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from infusion.methods.base import Method, Tensors
from infusion.regularisers.base import Regulariser, Step
from infusion.sampling.encode import each, own_embeddings
from infusion.tokens import Word
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError


class FixedNorm(Regulariser):
    """−μᵀv for each learned token's direction v, summed; the weight is κ. A weight of 0 fixes the norm alone."""

    def __init__(self, weight: float = 1e-4) -> None:
        super().__init__(weight)

    def start(self, sd: StableDiffusion, method: Method, tensors: Tensors, word: Word) -> None:
        """Puts the word to the norm. Raises ValueError for a method without one."""
        if (words := method.tokens(tensors)) is None:
            raise UserError(f"{method.name} learns no word whose norm could be fixed: take it off, or another method")
        self.words = [name for name, tensor in tensors.items() if any(tensor is rows for rows in each(words))]
        self.widths = sd.text.widths
        usual = sd.text.embed(torch.arange(sd.text.vocab_size)).detach().float().split(self.widths, dim=1)
        self.norm = torch.cat([part.norm(dim=1).mean().expand(part.shape[1]) for part in usual])  # (D,)
        self.direction = self.unit(own_embeddings(sd.text, word.superclass).mean(0))
        with torch.no_grad():
            self.settle(tensors)

    def term(self, sd: StableDiffusion, method: Method, tensors: Tensors, step: Step) -> Tensor:
        directions = self.unit(torch.cat([tensors[name] for name in self.words]))
        return -(directions @ self.direction.to(directions)).sum()

    def settle(self, tensors: Tensors) -> None:
        for name in self.words:
            tensors[name].copy_(self.unit(tensors[name]) * self.norm.to(tensors[name]))

    def unit(self, rows: Tensor) -> Tensor:
        """Rows (…, D) of length 1; of a pair of text encoders, in the space of each."""
        return torch.cat([F.normalize(part, dim=-1) for part in rows.split(self.widths, dim=-1)], dim=-1)
