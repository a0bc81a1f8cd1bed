"""DreamBooth: the whole UNet, bound to a rare word before the superclass (Ruiz et al. 2023, arXiv 2208.12242).

Prior preservation is a matter of the data: its class images are the node `prior` of `data.latents.ConceptData`.
"""

import torch
from torch import nn

from infusion.methods.base import RareWord
from infusion.tokens import Word
from ldm.pipeline import StableDiffusion


class DreamBooth(RareWord):
    """A change of every tensor of the UNet; the text encoder stays.

    It is learned as a difference from the base model, so that AdamW's weight decay pulls towards the base model.
    """

    name = "dreambooth"

    def start(self, sd: StableDiffusion, word: Word) -> dict[str, nn.Parameter]:
        weights = sd.unet.named_parameters()
        return {name: nn.Parameter(torch.zeros_like(weight, dtype=torch.float32)) for name, weight in weights}
