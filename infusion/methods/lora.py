"""LoRA: low-rank changes of the cross-attentions' projections (Hu et al. 2021, arXiv 2106.09685)."""

import math

import torch
from torch import nn

from infusion.deltas import DOWN, UP, as_edits
from infusion.inject import cross_attention_layers
from infusion.methods.base import TOKENS, RareWord, Tensors
from infusion.tokens import Word
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class LoRA(RareWord):
    """B A of rank r beside W_Q, W_K, W_V and W_out of every cross-attention; B starts at zero, A at random.

    Args:
        rank: r. alpha: the change is multiplied by α / r; None is r.
        identifier: a rare word before the superclass; "" for none.
        seed: of A.

    Raises:
        ValueError: a rank below 1 or above a layer's width, an α that is no finite number, or a negative seed.
    """

    name = "lora"

    def __init__(self, rank: int = 4, alpha: float | None = None, identifier: str = "sks", seed: int = 0) -> None:
        if rank < 1:
            raise UserError(f"rank: must be at least 1, not {rank}")
        super().__init__(identifier)
        self.rank, self.alpha, self.seed = rank, float(rank if alpha is None else alpha), seed
        if not math.isfinite(self.alpha):
            raise UserError(f"alpha: must be a finite number, not {alpha}")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed: must be from 0 to 2**63 - 1, not {seed}")
        self.options = {"rank": rank, "alpha": self.alpha, **self.options}

    def start(self, sd: StableDiffusion, word: Word) -> dict[str, nn.Parameter]:
        generator, learned = torch.Generator().manual_seed(self.seed), {}
        for name, layer in cross_attention_layers(sd.unet).items():
            for part in PROJECTIONS:
                out, width = layer.get_submodule(part).weight.shape
                if self.rank > min(out, width):
                    raise UserError(f"rank: must be at most {min(out, width)}, the width of {name}, not {self.rank}")
                bound = 1 / math.sqrt(width)  # the variance that a linear layer starts with
                down = (2 * torch.rand(self.rank, width, generator=generator, device="cpu") - 1) * bound
                learned[f"{name}.{part}.weight{DOWN}"] = nn.Parameter(down)
                learned[f"{name}.{part}.weight{UP}"] = nn.Parameter(torch.zeros(out, self.rank))
        return learned

    def differences(self, tensors: Tensors, strength: float = 1.0) -> dict[str, nn.Module]:
        """Raises ValueError for a down without its up, or the other way round."""
        changes = {name: tensor for name, tensor in tensors.items() if name != TOKENS}
        return as_edits(changes, strength, self.alpha)
