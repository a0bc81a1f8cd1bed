"""The gate: how strongly a concept is blended at each text token.

Its sigmoid and its similarity are those of Perfusion's gated rank-one update (Tewel et al. 2023, arXiv 2305.01644).
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from infusion.tokens import Word, concept_mask
from ldm.util.cli import UserError

if TYPE_CHECKING:
    from ldm.models.text import TextEncoder
    from ldm.models.tokenizer import Tokenizer

IDENTITY = "identity"  # the fingerprint of having no covariance file


@dataclass(frozen=True)
class Gate:
    """`g_j = σ((s_j / E − β) / τ)`, with `s_j = e_jᵀ C⁻¹ i*` and `E = i*ᵀ C⁻¹ i*` (docs/method.md, eq. 3).

    Attributes:
        kind: "sigmoid": on the concept's tokens, 0 elsewhere. "hard": 1 on the concept's tokens, 0 elsewhere (what
            the released code does). "global": the sigmoid on every token (as in Perfusion).
        beta: similarity to the target input at which the gate is half open; 1 is the target input itself.
        tau: temperature of the sigmoid, above 0.

    Raises:
        ValueError: an unknown kind, a tau not above 0, or a number that is not finite.
    """

    kind: Literal["sigmoid", "hard", "global"] = "sigmoid"
    beta: float = 0.75
    tau: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("sigmoid", "hard", "global"):
            raise UserError(f"kind: the gate must be 'sigmoid', 'hard' or 'global', not {self.kind!r}")
        if not 0 < self.tau < math.inf:
            raise UserError(f"tau: the gate's tau must be above 0 and finite, not {self.tau}")
        if not math.isfinite(self.beta):
            raise UserError(f"beta: the gate's beta must be finite, not {self.beta}")

    def __call__(
        self, encodings: Tensor, mask: Tensor, target_input: Tensor, inverse_covariance: Tensor | None = None
    ) -> Tensor:
        """The gate at every text token.

        Args:
            encodings: e, (B, L, D), the text encoder's output.
            mask: (B, L) bool, True on the concept's tokens.
            target_input: i*, (D,).
            inverse_covariance: C^-1, (D, D), of text encodings, uncentred; None is the identity.

        Returns:
            (B, L) in [0, 1], in float32 or the encodings' own type where that is wider.

        Raises:
            ValueError: the target input has no energy E > 0.
        """
        if self.kind == "hard":
            return mask.to(encodings.device, torch.promote_types(encodings.dtype, torch.float32))
        gates = torch.sigmoid((similarity(encodings, target_input, inverse_covariance) - self.beta) / self.tau)
        return gates if self.kind == "global" else gates * mask.to(gates)

    def replace(self, kind: str | None = None, beta: float | None = None, tau: float | None = None) -> "Gate":
        """The gate with another kind, beta or tau; None keeps this one's."""
        given = {"kind": kind, "beta": beta, "tau": tau}
        return dataclasses.replace(self, **{name: value for name, value in given.items() if value is not None})


def similarity(encodings: Tensor, target_input: Tensor, inverse_covariance: Tensor | None = None) -> Tensor:
    """`s / E` of every text token (eq. 3): (B, L) for encodings (B, L, D), the rest as in `Gate`.

    Raises:
        ValueError: the target input has no energy E > 0.
    """
    dtype = torch.promote_types(encodings.dtype, torch.float32)
    target = target_input.to(encodings.device, dtype)
    direction = target  # C^-1 i*, for a symmetric C
    if inverse_covariance is not None:
        direction = inverse_covariance.to(encodings.device, dtype) @ target  # (D,)
    energy = target @ direction
    if not energy > 0:
        raise UserError(f"the target input's energy i*' C^-1 i* must be above 0, not {energy.item()}")
    return encodings.to(dtype) @ direction / energy


def target_input(text_encoder: "TextEncoder", word: Word, compared: bool = True) -> Tensor:
    """i*: the mean encoding of the concept's tokens over the training prompts (Perfusion, arXiv 2305.01644).

    Perfusion keeps a running mean while its embedding is learned; here the text encoder is frozen, so the mean is
    exact.

    Args:
        text_encoder: as in `ldm.models.text`: a list of B strings to (B, L, D), with a `tokenizer`.
        word: the superclass word in its training prompts.
        compared: of the encodings that the gate compares (`TextEncoder.comparable`); else of those that the UNet reads.
    """
    prompts, masks = training_prompts(text_encoder.tokenizer, word)
    with torch.no_grad():
        encodings = text_encoder(prompts)  # (B, L, D)
        return mean_encoding(text_encoder.comparable(encodings) if compared else encodings, masks)


def mean_encoding(encodings: Tensor, masks: Tensor) -> Tensor:
    """The mean of encodings (B, L, D) over masks, bool (B, L); each row counts the same, however many tokens it has.

    Returns:
        (D,), in float32 or the encodings' own type where that is wider.
    """
    encodings = encodings.to(torch.promote_types(encodings.dtype, torch.float32))
    weights = masks.to(encodings)  # (B, L)
    return torch.einsum("bl,bld->bd", weights / weights.sum(1, keepdim=True), encodings).mean(0)


def training_prompts(tokenizer: "Tokenizer", word: Word) -> tuple[list[str], Tensor]:
    """The prompts that the templates make, and the concept's tokens in them, bool (B, L).

    Raises:
        ValueError: no templates, or one without a placeholder; a noun without tokens.
    """
    noun, templates = word.superclass, word.templates
    if not templates:
        raise UserError("templates: a concept needs at least one training prompt")
    if not tokenizer.encode(noun):
        raise UserError(f"superclass: {noun!r} has no tokens: give a word such as 'cat'")
    prompts, masks = zip(*(concept_mask(tokenizer, template, noun) for template in templates), strict=True)
    for template, mask in zip(templates, masks, strict=True):
        if not mask.any():
            raise UserError(f"the training prompt {template!r} has no {{}} for the concept")
    return list(prompts), torch.stack(masks)


def fingerprint(inverse_covariance: Tensor | None) -> str:
    """What a concept file says about its covariance: "identity", or the sha256 of C^-1 as float32."""
    if inverse_covariance is None:
        return IDENTITY
    return hashlib.sha256(inverse_covariance.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()
