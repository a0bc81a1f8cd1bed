"""Perfusion: gated rank-one changes of keys and values, with the keys locked (Tewel et al. 2023, arXiv 2305.01644).

Its gated rank-one update projects a text encoding e as `h = W (e − i* s/E) + σ((s/E − β)/τ) o*`, with `s = eᵀ C⁻¹ i*`
and `E = i*ᵀ C⁻¹ i*`: e's share along the target input i* is taken out, and o* is put in. That is two rank-one terms on
W e: `− s/E ⊗ W i*`, and the gate times o*. Values learn o*; keys have `o* = W_K i` with the superclass word's own i, so
that the concept attends like its superclass.
"""

from typing import Any

import torch
from torch import Tensor, nn

from infusion.attention import ResidualValue
from infusion.gate import Gate, similarity, target_input
from infusion.inject import cross_attention_layers
from infusion.methods.base import TOKENS, Method, Tensors, check_names
from infusion.sampling.encode import own_embeddings
from infusion.tokens import Word
from ldm.models.attention import CrossAttention
from ldm.pipeline import StableDiffusion
from ldm.util.cli import check_range

TARGET = "target_input"  # i*


class Removed(nn.Module):
    """The term `−(s/E) W i*`, which takes the share along the target input out: its residual `−W i*` follows i*."""

    def __init__(self, layer: CrossAttention, target: Tensor) -> None:
        super().__init__()
        self.target = target
        self.layer = (layer,)  # a tuple, so that it is no part of this module

    @property
    def residual(self) -> Tensor:
        return -self._project("to_v")

    @property
    def key(self) -> Tensor:
        return -self._project("to_k")

    def _project(self, part: str) -> Tensor:
        weight = getattr(self.layer[0], part).weight
        return (weight.float() @ self.target.to(weight.device)).detach()


class Perfusion(Method):
    """One o* for the values of each layer, and the input embedding of the superclass word.

    The gate's kind says where: "sigmoid" is local key-locking (the concept's own tokens), "global" all tokens.

    Args:
        token_learning_rate: of the input embedding.
        momentum: of i*, the running mean of the concept's encoding, in [0, 1].

    Raises:
        ValueError: a number out of range.
    """

    name = "perfusion"

    def __init__(self, token_learning_rate: float = 0.006, momentum: float = 0.99) -> None:
        check_range("token_learning_rate", token_learning_rate, 0, inside=True)
        check_range("momentum", momentum, 0, 1)
        self.token_learning_rate, self.momentum = token_learning_rate, momentum

    def start(self, sd: StableDiffusion, word: Word) -> dict[str, nn.Parameter]:
        target = target_input(sd.text, word, compared=False)
        learned = {TOKENS: nn.Parameter(own_embeddings(sd.text, word.superclass))}
        learned |= {TARGET: nn.Parameter(target.float(), requires_grad=False)}
        for name, layer in cross_attention_layers(sd.unet).items():
            learned[name] = nn.Parameter(layer.to_v.weight.float() @ learned[TARGET])
        return learned

    def differences(self, tensors: Tensors, strength: float = 1.0) -> dict[str, nn.Module]:
        return {}

    def terms(self, sd: StableDiffusion, tensors: Tensors, word: Word) -> list[dict[str, nn.Module]]:
        layers = cross_attention_layers(sd.unet)
        check_names(tensors, [TOKENS, TARGET, *layers])
        lock = target_input(sd.text, word, compared=False).float()
        put_in = {
            name: ResidualValue(tensors[name], layer.to_k.weight.float() @ lock) for name, layer in layers.items()
        }
        return [put_in, {name: Removed(layer, tensors[TARGET]) for name, layer in layers.items()}]

    def gates(
        self, gate: Gate, encodings: Tensor, mask: Tensor, target: Tensor, inverse_covariance: Tensor | None
    ) -> Tensor:
        share = similarity(encodings, target, inverse_covariance)  # (B, L)
        share = share if gate.kind == "global" else share * mask.to(share)
        return torch.stack([gate(encodings, mask, target, inverse_covariance), share], 1)

    def target(self, sd: StableDiffusion, tensors: Tensors, word: Word) -> Tensor:
        return sd.text.comparable(tensors[TARGET])

    @torch.no_grad()
    def observe(self, tensors: Tensors, encodings: Tensor, mask: Tensor) -> None:
        if mask.any():
            seen = encodings[mask].float().mean(0)  # (D,)
            tensors[TARGET].lerp_(seen.to(tensors[TARGET].device), 1 - self.momentum)

    def groups(self, tensors: Tensors) -> list[dict[str, Any]]:
        values = [tensor for name, tensor in tensors.items() if tensor.requires_grad and name != TOKENS]
        return [{"params": values}, {"params": [tensors[TOKENS]], "lr": self.token_learning_rate}]
