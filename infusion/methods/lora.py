"""LoRA: low-rank changes of the attentions' projections (Hu et al. 2021, arXiv 2106.09685)."""

import math
from typing import Literal

import torch
from torch import nn

from infusion.deltas import DOWN, TEXT, UP, as_edits
from infusion.inject import cross_attention_layers
from infusion.methods.base import TOKENS, RareWord, Tensors
from infusion.tokens import Word
from ldm.models.attention import CrossAttention
from ldm.models.text import ClipText
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError, check_range

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class LoRA(RareWord):
    """B A of rank r beside W_Q, W_K, W_V and W_out of the UNet's attentions; B starts at zero, A at random.

    With the defaults it is what diffusers' LoRA scripts train.

    Args:
        rank: r. alpha: the change is multiplied by α / r; None is r.
        identifier: a rare word before the superclass; "" for none.
        seed: of A.
        self_attention: change the self-attentions too; without, the cross-attentions alone.
        train_text_encoder: change the attentions of the text encoder too, which must be CLIP's (SD 1.x).
        init_lora_weights: of A: "gaussian", of variance 1/r² (diffusers' scripts), or "uniform", of the variance that a
            linear layer starts with (kohya's scripts, PEFT's default).

    Raises:
        ValueError: a rank below 1 or above a layer's width, an α that is no finite number, or a negative seed.
    """

    name = "lora"

    def __init__(
        self,
        rank: int = 4,
        alpha: float | None = None,
        identifier: str = "sks",
        seed: int = 0,
        self_attention: bool = True,
        train_text_encoder: bool = False,
        init_lora_weights: Literal["gaussian", "uniform"] = "gaussian",
    ) -> None:
        check_range("rank", rank, 1)
        super().__init__(identifier)
        self.rank, self.alpha, self.seed = rank, float(rank if alpha is None else alpha), seed
        self.self_attention, self.train_text_encoder = self_attention, train_text_encoder
        self.init_lora_weights = init_lora_weights
        check_range("alpha", self.alpha)
        check_range("seed", seed, 0, 2**63 - 1)
        self.options = {"rank": rank, "alpha": self.alpha, **self.options}

    def start(self, sd: StableDiffusion, word: Word) -> dict[str, nn.Parameter]:
        generator, learned = torch.Generator().manual_seed(self.seed), {}
        for name, (out, width) in self.shapes(sd).items():
            down = torch.empty(self.rank, width, device="cpu")
            if self.init_lora_weights == "gaussian":
                down.normal_(std=1 / self.rank, generator=generator)
            else:
                down.uniform_(generator=generator).mul_(2).sub_(1).mul_(1 / math.sqrt(width))
            learned[f"{name}{DOWN}"] = nn.Parameter(down)
            learned[f"{name}{UP}"] = nn.Parameter(torch.zeros(out, self.rank))
        return learned

    def shapes(self, sd: StableDiffusion) -> dict[str, torch.Size]:
        """The tensors that are changed, and their shapes (out, in), each of which has room for r."""
        layers = cross_attention_layers(sd.unet)
        if self.self_attention:
            modules = sd.unet.named_modules()
            layers |= {n: m for n, m in modules if isinstance(m, CrossAttention) and n.endswith("attn1")}
        parts = {(name, part): layer.get_submodule(part) for name, layer in layers.items() for part in PROJECTIONS}
        shapes = {f"{name}.{part}.weight": module.weight.shape for (name, part), module in parts.items()}
        if self.train_text_encoder:
            if not isinstance(sd.text, ClipText):
                raise UserError(f"train_text_encoder: LoRA changes CLIP's text encoder, which {sd.architecture} lacks")
            of_text = {n: m for n, m in sd.text.named_modules() if n.rpartition(".")[2] in TEXT_PROJECTIONS}
            shapes |= {f"{TEXT}{name}.weight": module.weight.shape for name, module in of_text.items()}
        for name, shape in shapes.items():
            if self.rank > min(shape):
                raise UserError(f"rank: must be at most {min(shape)}, the width of {name}, not {self.rank}")
        return shapes

    def differences(self, tensors: Tensors, strength: float = 1.0) -> dict[str, nn.Module]:
        """Raises ValueError for a down without its up, or the other way round."""
        changes = {name: tensor for name, tensor in tensors.items() if name != TOKENS}
        return as_edits(changes, strength, self.alpha)
