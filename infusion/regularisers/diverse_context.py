"""Diverse context: a word that can stand in many sentences (Kim, Chen and Qiu 2024, arXiv 2410.10058).

From the paper's public summaries: text alone regularises the word, by a masked-language loss on diverse prompts that
contain it. From the authors' working repository, which is not released and may differ from the paper: 25 prompts a
step; every token but the concept's and the superclass's is masked with probability 0.15; a frozen contextualizer reads
the text encoder's states; cross-entropy at the masked places alone, with λ from 10⁻⁵ (Textual Inversion) to 10⁻³
(Custom Diffusion, DreamBooth). Ours: the prompts; that places are drawn by a generator of their own; and that where
layers have words of their own (P+) each prompt is read with those of one, drawn at random, at the cost of one word.

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
from ldm.util.cli import UserError, naming


class DiverseContext(Regulariser):
    """Cross-entropy of the words that are masked in prompts with the concept.

    Args:
        contextualizer: its file.
        prompts: file of `ContextPrompts`. without, size: as there.
        weight: λ.
        mask_probability: of each token, in (0, 1).
        rows: prompts a step.
    """

    def __init__(
        self,
        contextualizer: str,
        prompts: str,
        weight: float = 1e-4,
        mask_probability: float = 0.15,
        rows: int = 25,
        without: list[str] | None = None,
        size: int | None = None,
    ) -> None:
        super().__init__(weight)
        if not 0 < mask_probability < 1:
            raise UserError(f"mask_probability: must be above 0 and below 1, not {mask_probability}")
        if not 1 <= rows <= 1000:
            raise UserError(f"rows: must be from 1 to 1,000, not {rows}")
        self.path, self.mask_probability, self.rows = contextualizer, mask_probability, rows
        self.file, self.prompts = prompts, ContextPrompts(prompts, without or (), size)

    def start(self, sd: StableDiffusion, method: Method, tensors: Tensors, word: Word) -> None:
        check_reads(method, tensors)
        self.superclass = word.superclass
        with naming(self.file):
            for prompt in self.prompts.longest():
                concept_places(sd.text.tokenizer, prompt, [method.noun(word.superclass)])
        if sd.device.type != "meta":
            self.contextualizer = load(self.path, sd)

    def term(self, sd: StableDiffusion, method: Method, tensors: Tensors, step: Step) -> Tensor:
        templates, noun = self.prompts.draw(self.rows, step.generator), method.noun(self.superclass)
        tokens, rows, concept = token_ids(sd.text, templates, [noun], [method.tokens(tensors)])
        labels = sd.text.tokenizer([fill(template, [noun]) for template in templates])  # (R, L)
        maskable = free_tokens(sd.text.tokenizer, labels, concept[:, 0], self.superclass)
        masked = maskable & (torch.rand(labels.shape, generator=step.generator) < self.mask_probability)
        contextualizer = self.contextualizer.to(sd.text.embeddings.device)
        if isinstance(rows, Mapping):
            tokens, rows = choose(
                sd.text, tokens, rows, torch.randint(len(rows), (self.rows,), generator=step.generator)
            )
        loss, accuracy = read_masked(sd.text, contextualizer, tokens, rows, labels, masked)
        step.log("accuracy", accuracy)
        return loss


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
