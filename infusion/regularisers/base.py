"""What a regulariser decides, and what of a training step it may look at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infusion.deltas import is_of_text
from infusion.methods.base import Method, Tensors
from infusion.tokens import Word
from ldm.models.tokenizer import Tokenizer
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError, check_range


@dataclass(frozen=True, eq=False)
class Step:
    """One batch of a training, as its regularisers see it.

    Attributes:
        templates: the batch's B prompts, with {} for the concept.
        text: their encodings as the UNet reads them, (B, L, D), with gradients where the word or the encoder is
            learned.
        generator: on the CPU, for the regulariser alone; what it gives depends on seed, step and batch only.
        predictions: for B prompts without {}, what the customised model and the base model, without gradients,
            predict for the batch's latents: (B, C, h, w) each. Timesteps and noise are drawn by the generator.
        log: writes a scalar under a name.
    """

    templates: Sequence[str]
    text: Tensor
    generator: torch.Generator
    predictions: Callable[[Sequence[str]], tuple[Tensor, Tensor]]
    log: Callable[[str, Tensor], None]


class Regulariser:
    """A term `weight · term(…)` of the loss; with a weight of 0 it is never called.

    Args:
        weight: λ, at least 0 and finite.
    """

    def __init__(self, weight: float = 1.0) -> None:
        check_range("weight", weight, 0)
        self.weight = weight

    def start(self, sd: StableDiffusion, method: Method, tensors: Tensors, word: Word) -> None:
        """Sees what is learned before training, and may change it in place.

        Raises:
            ValueError: this method learns nothing that the term could act on.
        """

    def check_texts(self, tokenizer: Tokenizer, noun: str) -> None:
        """Raises ValueError for a prompt of its own, with `noun` in it, that cannot be read."""

    def term(self, sd: StableDiffusion, method: Method, tensors: Tensors, step: Step) -> Tensor:
        """The term, a scalar without its weight, with gradients; `sd` has the method's edits."""
        raise NotImplementedError

    def settle(self, tensors: Tensors) -> None:
        """Sees what is learned behind every optimiser step, and may change it in place; without gradients."""


def check_reads(method: Method, tensors: Tensors) -> None:
    """Raises ValueError for a method under which no prompt reads otherwise than under the base model."""
    if method.tokens(tensors) is None and not any(map(is_of_text, method.differences(tensors))):
        raise UserError(
            f"{method.name} learns neither a word nor the text encoder, on which this term acts: take one that does, "
            "such as textual_inversion, infusion_word, or lora with train_text_encoder: true"
        )
