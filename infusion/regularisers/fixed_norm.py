"""Directional Textual Inversion: a word of fixed norm, whose direction is drawn to the superclass's (arXiv 2512.13672).

From the paper (read in a summary): the norm is the vocabulary's mean, about 0.4 for CLIP, where Textual Inversion's
words grow to twenty and more; the direction is learned by Riemannian gradient descent, under a von Mises-Fisher prior
exp(κ μᵀv) around the superclass's direction μ. Our reading: the optimiser is the method's own, and behind each of its
steps the word is put back to the norm, which is the retraction of such a descent.
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
        self.norm = sd.text.embeddings.detach().float().norm(dim=1).mean()
        self.direction = F.normalize(own_embeddings(sd.text, word.superclass).mean(0), dim=0)
        with torch.no_grad():
            self.settle(tensors)

    def term(self, sd: StableDiffusion, method: Method, tensors: Tensors, step: Step) -> Tensor:
        directions = F.normalize(torch.cat([tensors[name] for name in self.words]), dim=1)
        return -(directions @ self.direction.to(directions)).sum()

    def settle(self, tensors: Tensors) -> None:
        for name in self.words:
            tensors[name].copy_(F.normalize(tensors[name], dim=1) * self.norm.to(tensors[name]))
