"""The contextualizer reads masked words from a text encoder's states (diverse context, Kim et al., arXiv 2410.10058).

Its shape is that of the authors' working repository, which is not released and may differ from the paper: attention
over all places in both directions, feed-forward layers without a residual sum, and one linear layer to the vocabulary.
The input embedding of the [MASK] token belongs to it: the text encoder's own embeddings stay as they are.
"""

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.models.text import TextEncoder
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError, naming
from ldm.util.config import find
from ldm.weights.checkpoint import load_into, write
from ldm.weights.files import TensorFile

FORMAT = "infusion-contextualizer"
SHAPE = ("width", "vocabulary", "length", "layers", "heads")  # arguments that a file has to tell


class Contextualizer(nn.Module):
    """Logits of the vocabulary's V ids and of [MASK], the last, for states of a text encoder.

    Args:
        width: D of the states. vocabulary: V. length: L of a prompt.
        layers: of attention; a feed-forward layer follows each but the last.
        heads: of each.
    """

    def __init__(self, width: int, vocabulary: int, length: int, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        if layers < 1 or heads < 1 or width % heads:
            raise UserError(f"layers, heads: no contextualizer {width} wide has {layers} layers of {heads} heads")
        self.shape = dict(zip(SHAPE, (width, vocabulary, length, layers, heads), strict=True))
        self.mask = nn.Parameter(torch.randn(1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.attentions = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
            for _ in range(layers - 1)
        )
        self.words = nn.Linear(width, vocabulary + 1)
        for attention in self.attentions:
            nn.init.normal_(attention.in_proj_weight, std=1 / math.sqrt(width * 2 * layers))
            nn.init.normal_(attention.out_proj.weight, std=1 / math.sqrt(width))
        nn.init.normal_(self.words.weight, std=1 / math.sqrt(width))
        nn.init.zeros_(self.words.bias)

    @classmethod
    def of(cls, text: TextEncoder, layers: int = 4, heads: int = 4) -> "Contextualizer":
        """For a text encoder; [MASK] starts at random, of the vocabulary's mean L1 norm."""
        new = cls(text.width, text.vocab_size, text.tokenizer.context_length, layers, heads)
        with torch.no_grad():
            norm = text.embed(torch.arange(text.vocab_size)).float().abs().sum(1).mean()
            new.mask.mul_(norm.to(new.mask) / new.mask.abs().sum())
        return new

    def forward(self, states: Tensor, where: Tensor) -> Tensor:
        """(B, L, D) states of the text encoder -> logits (N, V + 1) at the N places of `where`, (B, L) bool."""
        x = states.float() + self.positions
        for i, (attention, norm) in enumerate(zip(self.attentions, self.norms, strict=True)):
            x = norm(x + attention(x, x, x, need_weights=False)[0])
            if i < len(self.feeds):
                x = self.feeds[i](x)
        return self.words(x[where])

    def read(self, text: TextEncoder, tokens: Tensor, masked: Tensor, rows: Tensor | None) -> Tensor:
        """States (B, L, D) of prompts in which the tokens of `masked`, (B, L) bool, are [MASK].

        Args:
            text: the text encoder.
            tokens, rows: as `encode_tokens` takes them, (B, L) and (T, D).
        """
        rows = self.mask if rows is None else torch.cat([rows, self.mask.to(rows)])
        return text.encode_tokens(torch.where(masked, text.vocab_size + len(rows) - 1, tokens), rows)

    def check_base(self, sd: StableDiffusion, metadata: Mapping[str, str]) -> None:
        """Raises ValueError for a file of another text encoder; warns of another checkpoint's."""
        here = (sd.text.width, sd.text.vocab_size, sd.text.tokenizer.context_length)
        there = tuple(self.shape[name] for name in SHAPE[:3])
        name = metadata.get("base_architecture", "")
        if name != sd.architecture or there != here:
            raise UserError(
                f"a contextualizer of {name[:60]!r}, {there[0]} wide, {there[1]:,} words, does not fit "
                f"{sd.architecture!r}, {here[0]} wide, {here[1]:,} words: train one (docs/regularisers.md)"
            )
        if (digest := sd.digests.get("text")) is not None and digest != metadata.get("base_sha256"):
            warnings.warn("the contextualizer is of another checkpoint than the one in use", stacklevel=2)


def save(path: Path, contextualizer: Contextualizer, facts: Mapping[str, object]) -> None:
    """Writes a contextualizer in float16, in one go; `facts` are `base_architecture`, `base_sha256` and what else."""
    metadata = {"format": FORMAT, "format_version": 1} | contextualizer.shape | dict(facts)
    tensors = {name: tensor.half() for name, tensor in contextualizer.state_dict().items()}
    write(path, tensors, {name: str(value) for name, value in metadata.items()})


def load(path: str | Path, sd: StableDiffusion) -> Contextualizer:
    """The frozen contextualizer of a base model, in float32.

    Raises:
        ValueError: the file is missing, damaged, no contextualizer, or of another text encoder; the message names it.
    """
    file = find(path)
    if not file.is_file():
        raise UserError(f"{path}: there is no such contextualizer; train one (docs/regularisers.md)")
    with TensorFile(file) as content:
        metadata = content.metadata
    with naming(str(path)):
        if metadata.get("format") != FORMAT:
            raise UserError(f"no contextualizer: its format is {metadata.get('format')!r}, not {FORMAT!r}")
        sizes = [metadata.get(name, "") for name in SHAPE]
        if not all(re.fullmatch("[0-9]{1,6}", size) for size in sizes):
            raise UserError(f"damaged: it says {', '.join(SHAPE)}: {', '.join(size[:10] for size in sizes)}")
        with torch.device("meta"):
            contextualizer = Contextualizer(*map(int, sizes))
        contextualizer.check_base(sd, metadata)
    if odd := load_into({"": contextualizer}, file):
        raise UserError(f"{path}: damaged: no contextualizer of the size that it says has {odd[0]}")
    return contextualizer.requires_grad_(False).eval()
