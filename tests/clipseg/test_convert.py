"""The original network, written down from its definition, against ours with its weights.

Original: CLIP's blocks with their outputs kept at the chosen layers (counted from 0), position embeddings interpolated
bicubically, each activation reduced to the decoder's width and added to what came before, deepest first; the first sum
modulated by the text (FiLM, `γ(c) ⊙ a + β(c)`); a post-norm encoder layer after each; tokens back to a square, and
three convolutions. open_clip provides CLIP's blocks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPSegConfig

from clipseg.convert import convert_clip, convert_decoder
from clipseg.model import MEAN, STD
from clipseg.weights import empty, fill, refined_config
from ldm.models.clip import Clip
from ldm.models.text import ClipText
from ldm.models.tokenizer import Tokenizer

VOCABULARY = 49408  # CLIP's own


class Decoder(nn.Module):
    """The parameters of the original decoder under their original names."""

    def __init__(self, features: int, width: int, dim: int, heads: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.film_mul, self.film_add = nn.Linear(features, dim), nn.Linear(features, dim)
        self.reduce = nn.Linear(width, dim)  # stored, and not used
        self.reduces = nn.ModuleList(nn.Linear(width, dim) for _ in range(depth))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(dim, heads, hidden) for _ in range(depth))
        self.trans_conv = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(dim, dim // 2, 4, 4), nn.ReLU(),
            nn.ConvTranspose2d(dim // 2, 1, 4, 4),
        )  # fmt: skip

    def forward(self, activations: list[Tensor], condition: Tensor) -> Tensor:
        """Activations, each (1 + N, B, width), shallowest first, and (B, features) -> logits (B, 1, H, W)."""
        tokens = torch.zeros(())
        for i, (reduce, block) in enumerate(zip(self.reduces, self.blocks, strict=True)):
            tokens = tokens + reduce(activations[-1 - i])
            if i == 0:
                tokens = self.film_mul(condition) * tokens + self.film_add(condition)
            tokens = block(tokens)
        patches = tokens[1:].permute(1, 2, 0)  # (B, dim, N)
        return self.trans_conv(patches.unflatten(2, (math.isqrt(patches.shape[2]), -1)))


@dataclass
class Original:
    """A CLIP of open_clip's, whose parameters are named as OpenAI's are, and the decoder."""

    clip: nn.Module
    decoder: Decoder
    layers: tuple[int, ...]

    @torch.no_grad()
    def __call__(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        visual = self.clip.visual
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)  # (B, N, width)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
        old, new = (math.isqrt(len(p) - 1) for p in (visual.positional_embedding, x[0]))
        positions = visual.positional_embedding[1:].T.unflatten(1, (old, old))[None]
        if old != new:
            positions = F.interpolate(positions, (new, new), mode="bicubic", align_corners=False)
        positions = torch.cat([visual.positional_embedding[:1], positions[0].flatten(1).T])
        x, kept = visual.ln_pre(x + positions), []
        for i, block in enumerate(visual.transformer.resblocks):
            x = block(x)
            kept += [x.transpose(0, 1)] if i in self.layers else []
        return self.decoder(kept, self.clip.encode_text(tokens))[:, 0]


@pytest.fixture(scope="module")
def original(randomise) -> Callable[[CLIPSegConfig], Original]:
    """Makes the original network of a config's size, with random weights."""

    def make(config: CLIPSegConfig) -> Original:
        clip, decoder = parts(config)
        for seed, module in enumerate((clip, decoder)):
            randomise(module, seed)
        return Original(clip.eval(), decoder.eval(), tuple(config.extract_layers))

    return make


def parts(config: CLIPSegConfig) -> tuple[nn.Module, Decoder]:
    vision, text = config.vision_config, config.text_config
    clip = open_clip.CLIP(
        config.projection_dim,
        open_clip.CLIPVisionCfg(layers=vision.num_hidden_layers, width=vision.hidden_size,
                                head_width=vision.hidden_size // vision.num_attention_heads,
                                mlp_ratio=vision.intermediate_size / vision.hidden_size,
                                patch_size=vision.patch_size, image_size=vision.image_size),
        open_clip.CLIPTextCfg(context_length=text.max_position_embeddings, vocab_size=text.vocab_size,
                              width=text.hidden_size, heads=text.num_attention_heads, layers=text.num_hidden_layers,
                              mlp_ratio=text.intermediate_size / text.hidden_size),
        quick_gelu=True,
    )  # fmt: skip
    decoder = Decoder(
        config.projection_dim, vision.hidden_size, config.reduce_dim, config.decoder_num_attention_heads,
        config.decoder_intermediate_size, len(config.extract_layers),
    )  # fmt: skip
    return clip, decoder


def difference(theirs: Original, config: CLIPSegConfig, size: int) -> float:
    """Largest difference of logits as a share of their standard deviation."""
    tensors = convert_decoder(theirs.decoder.state_dict()) | convert_clip(theirs.clip.state_dict())
    ours = fill(empty(config, size), tensors, "original")
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    prompts = ["a photo of a cat", "teapot"]
    pixels = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = theirs(pixels, ours.tokenizer(prompts))
    assert expected.shape == (2, size, size) and (expected[0] - expected[1]).std() > 0.1 * expected.std() > 0
    with torch.no_grad():
        return ((ours(images, prompts) - expected).abs().max() / expected.std()).item()


@pytest.fixture(scope="module")
def config(small_config) -> CLIPSegConfig:
    return small_config(VOCABULARY, VOCABULARY - 1)


@pytest.mark.parametrize("size", [48, 80])  # as many patches as position embeddings, and more
def test_the_original_network_and_ours_agree(original, config, size):
    assert difference(original(config), config, size) < 1e-4


@pytest.mark.slow
def test_they_agree_at_full_size(original):
    config = refined_config()
    assert difference(original(config), config, 352) < 1e-4


def test_the_decoder_file_has_54_tensors():
    decoder = Decoder(512, 768, 64, 4, 2048, 3)
    assert len(decoder.state_dict()) == 54
    renamed = convert_decoder(decoder.state_dict())
    network = empty(refined_config(), 352).network
    expected = {name: t for name, t in network.state_dict().items() if name.startswith("decoder.")}
    assert {name: t.shape for name, t in renamed.items()} == {name: t.shape for name, t in expected.items()}


def test_transformers_layout_of_clip_gives_the_same(original, config):
    theirs = original(config)
    renamed = convert_clip(theirs.clip.state_dict())
    again = convert_clip({name.removeprefix("clip."): t for name, t in renamed.items()})
    assert again.keys() == renamed.keys() and all(torch.equal(again[name], t) for name, t in renamed.items())


def test_the_layout_of_our_own_clip_is_read(config):
    text = ClipText(Tokenizer(context_length=16), 24, 48, layers=2, heads=3, max_length=16)
    clip = Clip(text, image_size=48, patch_size=16, width=32, layers=4, heads=2, features=20)
    renamed = convert_clip(clip.state_dict())
    expected = {name: t for name, t in empty(config, 48).network.state_dict().items() if name.startswith("clip.")}
    assert {name: t.shape for name, t in renamed.items()} == {name: t.shape for name, t in expected.items()}
    weight = clip.vision.state_dict()["encoder.layers.3.mlp.fc1.weight"]
    assert torch.equal(renamed["clip.vision_model.encoder.layers.3.mlp.fc1.weight"], weight)
