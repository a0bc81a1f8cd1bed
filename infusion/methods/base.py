"""What a customisation method decides. Trainer, sampler, concept file and metrics know methods by this alone.

Up to four kinds of edit make a method: learned input embeddings of the words that stand for the concept (`tokens`),
changes of weights (`differences`) and of layers' outputs (`outputs`), and gated rank-one terms in the UNet's
cross-attentions (`terms`, `gates`). What is added to the loss of any method is in `infusion.regularisers`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from infusion.attention import OwnPass, Tape
from infusion.deltas import as_edits
from infusion.gate import Gate, target_input
from infusion.inject import cross_attention_layers
from infusion.sampling.encode import Words
from infusion.tokens import Word
from ldm.models.attention import Context
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError

if TYPE_CHECKING:
    from infusion.concepts.concept import Concept

Tensors = Mapping[str, Tensor]  # name -> tensor: all that a concept consists of, as its file holds it
TOKENS = "tokens"  # of learned input embeddings


class Method:
    """A method; the file that holds it is called like it. Without edits, it is the base model.

    Attributes:
        name: of the method and of its file.
        attention: "own", or "foundation" for a second stream that takes over the attention of the base model.
        options: the constructor's arguments that a concept file has to remember.
        everywhere: whether it changes weights, and so acts on prompts without the concept's word too.
    """

    name: ClassVar[str]
    attention: str = "own"
    options: Mapping[str, Any] = {}
    everywhere: ClassVar[bool] = False

    @classmethod
    def from_concept(cls, concept: "Concept") -> Self:
        """The method as a concept was trained with it."""
        return cls(**concept.options)

    def noun(self, superclass: str) -> str:
        """The words that stand in prompts for the concept."""
        return superclass

    def start(self, sd: StableDiffusion, word: Word) -> dict[str, nn.Parameter]:
        """What a concept is before training, float32; what requires gradients is learned."""
        raise NotImplementedError

    def tokens(self, tensors: Tensors) -> Words | None:
        """Input embeddings (T, D) of the first T tokens of `noun`; None keeps the vocabulary's.

        A mapping has others for each spatial transformer of the UNet, by its name.
        """
        return tensors.get(TOKENS)

    def differences(self, tensors: Tensors, strength: float = 1.0) -> dict[str, nn.Module]:
        """The model's tensor -> what changes it (`infusion.deltas.as_edits`). Parameters are kept as they are.

        A tensor of the UNet has its name there; those of text encoder and autoencoder begin with `text.` and `vae.`.
        Unless a method says otherwise, everything but the tokens is a change.
        """
        return as_edits({name: tensor for name, tensor in tensors.items() if name != TOKENS}, strength)

    def outputs(self, tensors: Tensors, strength: float = 1.0) -> dict[str, nn.Module]:
        """The UNet's layer -> what changes its output, see `infusion.deltas.find_layers`. Parameters are kept."""
        return {}

    def terms(self, sd: StableDiffusion, tensors: Tensors, word: Word) -> list[dict[str, nn.Module]]:
        """R rank-one terms, each with a `ResidualValue` for every cross-attention layer. Parameters are kept."""
        return []

    def gates(
        self, gate: Gate, encodings: Tensor, mask: Tensor, target: Tensor, inverse_covariance: Tensor | None
    ) -> Tensor:
        """How strongly each term is blended at each token, (B, R, L); arguments as of a `Gate`.

        Encodings and target are those that the gate compares (`ldm.models.text.TextEncoder.comparable`).
        """
        return torch.zeros(len(mask), 0, mask.shape[1], device=encodings.device)

    def target(self, sd: StableDiffusion, tensors: Tensors, word: Word) -> Tensor:
        """The gate's target input i*, (D,)."""
        return target_input(sd.text, word)

    def observe(self, tensors: Tensors, encodings: Tensor, mask: Tensor) -> None:
        """Sees encodings (B, L, D) and the concept's tokens (B, L) whenever prompts are encoded for training."""

    def groups(self, tensors: Tensors) -> list[dict[str, Any]]:
        """Parameter groups for the optimiser; a group may have a learning rate of its own, `lr`."""
        return [{"params": [tensor for tensor in tensors.values() if tensor.requires_grad]}]

    def predict(
        self, unet: nn.Module, latents: Tensor, timesteps: Tensor, context: Context, gates: Tensor, tape: Tape
    ) -> Tensor:
        """The customised model's prediction in training, with gradients to what is learned.

        Args:
            unet: with this method's edits.
            latents: noisy, (B, 4, h, w). timesteps: (B,). context: B rows. gates: (B, R, L).
            tape: empty; left with the attention of every layer that has terms.

        Returns:
            (B, 4, h, w) in the model's own prediction type.
        """
        if gates.shape[1]:
            strengths = torch.ones(gates.shape[1], device=latents.device)
            context = context.becomes(OwnPass, gates=gates, tape=tape, strengths=strengths)
        return unet(latents, timesteps, context)


class RareWord(Method):
    """A method that binds the concept to a rare word before the superclass.

    Args:
        identifier: the rare word; "" for none.
    """

    everywhere = True

    def __init__(self, identifier: str = "sks") -> None:
        self.identifier = identifier
        self.options = {"identifier": identifier}

    def noun(self, superclass: str) -> str:
        return f"{self.identifier} {superclass}".strip()


def by_layer(
    sd: StableDiffusion, terms: Sequence[Mapping[str, nn.Module]], tokens: Sequence[Words | None]
) -> dict[str, nn.ModuleList]:
    """Terms, each by layer, as the edits that `infusion.inject` takes: layer -> all terms.

    Without terms there are edits, of nothing, where some of the tokens differ between layers: a plain layer would not
    know which to read.
    """
    layered = any(isinstance(words, Mapping) for words in tokens)
    names = terms[0] if terms else cross_attention_layers(sd.unet) if layered else ()
    return {name: nn.ModuleList(term[name] for term in terms) for name in names}


def check_names(tensors: Tensors, known: Sequence[str]) -> None:
    """Raises ValueError for a tensor that the model has no place for."""
    if unknown := [name for name in tensors if name not in set(known)]:
        raise UserError(f"there is a tensor {unknown[0]!r}, for which the UNet has no place")
