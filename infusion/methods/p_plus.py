"""P+: a word for each cross-attention layer (Extended Textual Inversion, Voynov et al. 2023, arXiv 2303.09522).

From the paper: a prompt is encoded once for each cross-attention layer of the UNet, with that layer's own embedding in
the concept's place; only these embeddings are learned. Ours: they take the place of the superclass word and start from
it, as Textual Inversion does here; the layers of one spatial transformer share a word, so that SDXL has 11 words for
its 70 layers (SD 1.5 and 2.1 have one layer in each, 16 in all); what is no layer, such as SDXL's pooled vector, takes
the mean over the words' encodings.
"""

from torch import Tensor, nn

from infusion.inject import cross_attention_layers
from infusion.methods.base import TOKENS, Method, Tensors, check_names
from infusion.sampling.encode import own_embeddings
from infusion.tokens import Word
from ldm.models.attention import transformer_of
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError


class PPlus(Method):
    """For each spatial transformer one learned vector for each token of the superclass word, `tokens.<transformer>`."""

    name = "p_plus"

    def start(self, sd: StableDiffusion, word: Word) -> dict[str, nn.Parameter]:
        usual = own_embeddings(sd.text, word.superclass)
        return {name: nn.Parameter(usual.clone()) for name in _names(sd)}

    def tokens(self, tensors: Tensors) -> dict[str, Tensor]:
        return {name.removeprefix(f"{TOKENS}."): tensor for name, tensor in tensors.items()}

    def differences(self, tensors: Tensors, strength: float = 1.0) -> dict[str, nn.Module]:
        return {}

    def terms(self, sd: StableDiffusion, tensors: Tensors, word: Word) -> list[dict[str, nn.Module]]:
        """None. Raises ValueError for words that are not those of the UNet's transformers, or not alike."""
        names = _names(sd)
        check_names(tensors, names)
        if lacking := [name for name in names if name not in tensors]:
            raise UserError(f"the concept lacks {lacking[0]!r}")
        for name in names:
            if tensors[name].shape != tensors[names[0]].shape:
                raise UserError(f"{name} is {tuple(tensors[name].shape)}, {names[0]} {tuple(tensors[names[0]].shape)}")
        return []


def _names(sd: StableDiffusion) -> list[str]:
    """What the words are called, in the order of the UNet."""
    return [f"{TOKENS}.{place}" for place in dict.fromkeys(map(transformer_of, cross_attention_layers(sd.unet)))]
