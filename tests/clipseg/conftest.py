"""CLIPSeg in small, with random weights of unit gain."""

from collections.abc import Callable

import pytest
import torch
from transformers import CLIPSegConfig

from clipseg.model import ClipSeg
from ldm.models.tokenizer import Tokenizer


def _small_config(vocab_size: int, end: int, context: int = 16) -> CLIPSegConfig:
    text = {"vocab_size": vocab_size, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 3, "max_position_embeddings": context, "eos_token_id": end}
    text |= {"bos_token_id": 0, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision |= {"image_size": 48, "patch_size": 16}
    return CLIPSegConfig(
        text_config=text, vision_config=vision, projection_dim=20, extract_layers=[0, 1, 3], reduce_dim=16,
        decoder_num_attention_heads=4, decoder_intermediate_size=40, use_complex_transposed_convolution=True,
    )  # fmt: skip


def _randomise(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "embedding" in name:
            values *= 0.5
        elif parameter.ndim >= 2:
            values /= max(parameter.shape[0], parameter[0].numel()) ** 0.5
        else:
            values = 0.2 * values + name.endswith("weight")
        parameter.data = values


@pytest.fixture(scope="session")
def small_config() -> Callable[..., CLIPSegConfig]:
    """(vocab_size, end, context=16) -> the config of a network with patches of 16 and 3 × 3 position embeddings."""
    return _small_config


@pytest.fixture(scope="session")
def randomise() -> Callable[..., None]:
    """(module, seed=0) -> draws every parameter such that activations keep their scale and nothing is zero."""
    return _randomise


@pytest.fixture(scope="module")
def clipseg() -> ClipSeg:
    tokenizer = Tokenizer(merges=1000, context_length=16)
    model = ClipSeg(_small_config(tokenizer.vocab_size, tokenizer.eos), tokenizer, image_size=64)
    _randomise(model)
    return model.eval()
