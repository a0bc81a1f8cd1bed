"""Output preservation: where the concept is not asked for, the prediction stays that of the base model.

From the trainers that have it (kohya's differential output preservation, OneTrainer's prior preservation): the mean
squared error between the customised and the base model's predictions for captions of the superclass, or for the empty
caption, on the concept's own photos; no images of the superclass are stored. Our reading: each row of a batch has one
of the two at random, with noise and timesteps of its own. What acts on the concept's tokens alone, as Infusion does,
has nothing to preserve: the term is 0.
"""

import torch
from torch import Tensor

from infusion.methods.base import Method, Tensors
from infusion.regularisers.base import Regulariser, Step
from infusion.tokens import Word, fill
from ldm.pipeline import StableDiffusion
from ldm.util.cli import check_range


class OutputPreservation(Regulariser):
    """`mean (ε_θ(x_t, t, c) − ε_0(x_t, t, c))²` with c the row's caption of the superclass, or the empty one.

    Args:
        weight: λ.
        empty: share of rows with the empty caption, in [0, 1].
    """

    def __init__(self, weight: float = 1.0, empty: float = 0.5) -> None:
        super().__init__(weight)
        check_range("empty", empty, 0, 1)
        self.empty = empty

    def start(self, sd: StableDiffusion, method: Method, tensors: Tensors, word: Word) -> None:
        self.superclass = word.superclass

    def term(self, sd: StableDiffusion, method: Method, tensors: Tensors, step: Step) -> Tensor:
        captions = [fill(template, [self.superclass]) for template in step.templates]
        empty = torch.rand(len(captions), generator=step.generator) < self.empty
        captions = ["" if none else caption for none, caption in zip(empty, captions, strict=True)]
        customised, base = step.predictions(captions)
        return (customised.float() - base.float()).square().mean()
