"""Diverse context: a word that can stand in many sentences (Kim, Chen and Qiu 2024, arXiv 2410.10058).

From the paper's public summaries: text alone regularises the word, by a masked-language loss on diverse prompts that
contain it. From the authors' working repository, which is not released and may differ from the paper: 25 prompts a
step; every token but the concept's and the superclass's is masked with probability 0.15; a frozen contextualizer reads
the text encoder's states; cross-entropy at the masked places alone, with λ by method (`WEIGHTS`), and the smaller the
larger the learning rate. Ours: that λ times the learning rate stays what it was there; the prompts; that places are
drawn by a generator of their own; and that where layers have words of their own (P+) each prompt is read with those of
one, drawn at random, at the cost of one word.

The text encoder is causal: a masked word before the concept is read without it, and its gradient comes through the
contextualizer alone. What the UNet learns gets none.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from infusion.covariance import word_tokens
from infusion.methods.base import Method, Tensors
from infusion.regularisers.base import Regulariser, Step, check_reads
from infusion.regularisers.context_prompts import ContextPrompts
from infusion.regularisers.contextualizer import Contextualizer, load
from infusion.sampling.encode import choose, token_ids
from infusion.tokens import Word, concept_places, fill
from ldm.models.tokenizer import Tokenizer
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError, check_range, naming

WEIGHTS = {  # method -> λ there, of several the middle one, and the learning rate that it went with
    "textual_inversion": (5e-5, 2e-3),
    "infusion_word": (5e-5, 2e-3),  # ours: its word is learned as Textual Inversion's
    "p_plus": (2.5e-4, 5e-4),
    "custom_diffusion": (5e-4, 4e-5),
    "dreambooth": (5e-4, 1e-6),
}


class DiverseContext(Regulariser):
    """Cross-entropy of the words that are masked in prompts with the concept.

    Args:
        contextualizer: its file.
        prompts: file of `ContextPrompts`. without, size: as there.
        weight: λ; None is that of `WEIGHTS` for the method, times its learning rate, by `learning_rate`.
        learning_rate: of the training; needed for a weight of None alone.
        mask_probability: of each token, in (0, 1).
        rows: prompts a step.
    """

    def __init__(
        self,
        contextualizer: str,
        prompts: str,
        weight: float | None = None,
        learning_rate: float | None = None,
        mask_probability: float = 0.15,
        rows: int = 25,
        without: list[str] | None = None,
        size: int | None = None,
    ) -> None:
        super().__init__(0.0 if weight is None else weight)
        self.by_method, self.learning_rate = weight is None, learning_rate
        check_range("mask_probability", mask_probability, 0, 1, inside=True)
        check_range("rows", rows, 1, 1000)
        self.path, self.mask_probability, self.rows = contextualizer, mask_probability, rows
        self.file, self.prompts = prompts, ContextPrompts(prompts, without or (), size)

    def start(self, sd: StableDiffusion, method: Method, tensors: Tensors, word: Word) -> None:
        """Raises ValueError for a method without a word, or without a weight; for a file that does not fit."""
        check_reads(method, tensors)
        if self.by_method:
            self.weight = usual_weight(method.name, self.learning_rate)
        self.superclass = word.superclass
        self.check_texts(sd.text.tokenizer, method.noun(word.superclass))
        if sd.device.type != "meta":
            self.contextualizer = load(self.path, sd)

    def check_texts(self, tokenizer: Tokenizer, noun: str) -> None:
        with naming(self.file):
            for prompt in self.prompts.longest():
                concept_places(tokenizer, prompt, [noun])

    def term(self, sd: StableDiffusion, method: Method, tensors: Tensors, step: Step) -> Tensor:
        templates, noun = self.prompts.draw(self.rows, step.generator), method.noun(self.superclass)
        tokens, rows, concept = token_ids(sd.text, templates, [noun], [method.tokens(tensors)])
        labels = sd.text.tokenizer([fill(template, [noun]) for template in templates])  # (R, L)
        maskable = free_tokens(sd.text.tokenizer, labels, concept[:, 0], self.superclass)
        masked = maskable & (torch.rand(labels.shape, generator=step.generator) < self.mask_probability)
        contextualizer = self.contextualizer.to(next(sd.text.parameters()).device)
        if isinstance(rows, Mapping):
            tokens, rows = choose(
                sd.text, tokens, rows, torch.randint(len(rows), (self.rows,), generator=step.generator)
            )
        loss, accuracy = read_masked(sd.text, contextualizer, tokens, rows, labels, masked)
        step.log("accuracy", accuracy)
        step.log("weight", torch.tensor(float(self.weight)))
        return loss


def usual_weight(method: str, learning_rate: float | None) -> float:
    """λ of a method at a learning rate, by `WEIGHTS`; raises ValueError where there is none."""
    if method not in WEIGHTS or not learning_rate:
        raise UserError(f"weight: none is known for {method} at the learning rate {learning_rate}: give one")
    weight, rate = WEIGHTS[method]
    return weight * rate / learning_rate


def free_tokens(tokenizer: Tokenizer, labels: Tensor, concept: Tensor, superclass: str) -> Tensor:
    """True on the words (R, L) that may be masked: neither the concept's, (R, L) bool, nor the superclass's."""
    noun = torch.tensor(tokenizer.encode(superclass))
    return word_tokens(tokenizer, labels) & ~concept & ~torch.isin(labels, noun)


def read_masked(
    text: torch.nn.Module,
    contextualizer: Contextualizer,
    tokens: Tensor,
    rows: Tensor | None,
    labels: Tensor,
    masked: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy at the masked places, and the share of them whose word is the likeliest; 0 without any.

    Args:
        tokens, rows: as `encode_tokens` takes them. labels: ids of the vocabulary, (R, L). masked: (R, L) bool.
    """
    states = contextualizer.read(text, tokens, masked, rows)
    masked, labels = masked.to(states.device), labels.to(states.device)
    logits, wanted = contextualizer(states, masked), labels[masked]
    count = max(1, len(wanted))
    loss = F.cross_entropy(logits.float(), wanted, reduction="sum") / count
    return loss, (logits.argmax(-1) == wanted).sum() / count
