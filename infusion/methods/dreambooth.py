"""DreamBooth: the whole UNet, bound to a rare word before the superclass (Ruiz et al. 2023, arXiv 2208.12242).

Prior preservation is a matter of the data: its class images are the node `prior` of `data.latents.ConceptData`.
"""

import torch
from torch import nn

from infusion.deltas import TEXT
from infusion.methods.base import RareWord
from infusion.tokens import Word
from ldm.pipeline import StableDiffusion


class DreamBooth(RareWord):
    """A change of every tensor of the UNet.

    It is learned as a difference from the base model, so that AdamW's weight decay pulls towards the base model;
    diffusers' script, which learns the weights themselves, pulls them towards zero.

    Args:
        identifier: the rare word; "" for none.
        train_text_encoder: change every tensor of the text encoder too.
    """

    name = "dreambooth"

    def __init__(self, identifier: str = "sks", train_text_encoder: bool = False) -> None:
        super().__init__(identifier)
        self.train_text_encoder = train_text_encoder

    def start(self, sd: StableDiffusion, word: Word) -> dict[str, nn.Parameter]:
        weights = dict(sd.unet.named_parameters())
        if self.train_text_encoder:
            weights |= {f"{TEXT}{name}": weight for name, weight in sd.text.named_parameters()}
        return {name: nn.Parameter(torch.zeros_like(weight, dtype=torch.float32)) for name, weight in weights.items()}
