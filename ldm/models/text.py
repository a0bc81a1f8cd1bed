"""Text encoders of Stable Diffusion: CLIP's text tower (SD 1.x) and OpenCLIP's (SD 2.x)."""

from collections.abc import Sequence

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.models.tokenizer import Tokenizer
from ldm.util.cli import UserError


class ClipText(nn.Module):
    """CLIP's text tower: last layer, then the final norm (SD 1.x; Radford et al. 2021, arXiv 2103.00020).

    Parameters are named `transformer.text_model.*`, as in the published checkpoints, in every transformers
    version: 5.6 and later drop the `text_model` level, so it is put back here.

    Args:
        tokenizer: its `context_length` must be `max_length`.
        hidden_size: width D of the encodings.
        intermediate_size: width of the feed-forward layers.
        layers, heads: depth, and heads of each layer.
        max_length: number of positions L.
        vocab_size: number of token embeddings; None takes the tokenizer's.
        hidden_act: activation of the feed-forward layers, by transformers' name.

    Raises:
        ValueError: tokenizer and model do not fit.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        layers: int = 12,
        heads: int = 12,
        max_length: int = 77,
        vocab_size: int | None = None,
        hidden_act: str = "quick_gelu",
    ) -> None:
        super().__init__()
        vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        _check_fit(tokenizer, vocab_size, max_length)
        self.tokenizer = tokenizer
        self.width = hidden_size
        config = CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=max_length,
            hidden_act=hidden_act,
            bos_token_id=tokenizer.bos,
            eos_token_id=tokenizer.eos,
            pad_token_id=tokenizer.pad,
        )
        model = CLIPTextModel(config)
        tower = getattr(model, "text_model", model)
        # not in any checkpoint: keep it real when everything else is built on the meta device
        tower.embeddings.position_ids = torch.arange(max_length, device="cpu")[None]  # (1, L)
        self.transformer = nn.ModuleDict({"text_model": tower})

    @property
    def embeddings(self) -> nn.Parameter:
        """The input embedding of every token id, (V, D)."""
        return self.transformer["text_model"].embeddings.token_embedding.weight

    def encode_tokens(self, tokens: Tensor, learned: Tensor | None = None) -> Tensor:
        """Encodings (B, L, D) of token ids (B, L) int64, on any device; `learned` (T, D) embeds the ids from V on."""
        tower = self.transformer["text_model"]
        tokens = tokens.to(tower.embeddings.position_ids.device)
        if learned is None:
            return tower(input_ids=tokens).last_hidden_state
        rows = {"embeddings.token_embedding.weight": torch.cat([self.embeddings, learned.to(self.embeddings)])}
        return functional_call(tower, rows, kwargs={"input_ids": tokens}).last_hidden_state

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Encodings (B, L, D) of a list of B strings."""
        return self.encode_tokens(self.tokenizer(texts))


class OpenClipText(nn.Module):
    """OpenCLIP's text tower: penultimate layer, then the final norm (SD 2.x; Cherti et al. 2022, arXiv 2212.07143).

    Parameters are named `model.*`, as in the published checkpoints. The last layer and `text_projection` are for
    `pooled` alone; `logit_scale` is stored there too, and unused.

    Args:
        tokenizer: its `context_length` must be `max_length`.
        hidden_size: width D of the encodings.
        layers, heads: depth, and heads of each layer.
        max_length: number of positions L.
        vocab_size: number of token embeddings; None takes the tokenizer's.
        projection_size: width of the space shared with images; None takes `hidden_size`.
        skip: number of last layers that are not run.

    Raises:
        ValueError: tokenizer and model do not fit, or `skip` leaves no layer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        hidden_size: int = 1024,
        layers: int = 24,
        heads: int = 16,
        max_length: int = 77,
        vocab_size: int | None = None,
        projection_size: int | None = None,
        skip: int = 1,
    ) -> None:
        super().__init__()
        vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        _check_fit(tokenizer, vocab_size, max_length)
        if not 0 <= skip < layers:
            raise UserError(f"skip must lie between 0 and {layers - 1}, not {skip}")
        self.tokenizer = tokenizer
        self.width = hidden_size
        self.skip = skip
        text = open_clip.CLIPTextCfg(
            context_length=max_length, vocab_size=vocab_size, width=hidden_size, heads=heads, layers=layers
        )
        # open_clip has no text tower with these names by itself: the smallest image tower comes along, and goes
        vision = open_clip.CLIPVisionCfg(layers=1, width=64, head_width=64, patch_size=32, image_size=32)
        self.model = open_clip.CLIP(projection_size or hidden_size, vision, text)
        del self.model.visual
        # not in any checkpoint: keep it real when everything else is built on the meta device
        causal = torch.full((max_length, max_length), float("-inf"), device="cpu").triu_(1)
        self.model.register_buffer("attn_mask", causal, persistent=False)  # (L, L), added to the logits

    @property
    def embeddings(self) -> nn.Parameter:
        """The input embedding of every token id, (V, D)."""
        return self.model.token_embedding.weight

    def encode_tokens(self, tokens: Tensor, learned: Tensor | None = None) -> Tensor:
        """Encodings (B, L, D) of token ids (B, L) int64, on any device; `learned` (T, D) embeds the ids from V on."""
        return self._run(tokens, learned, self.skip)

    def pooled(self, tokens: Tensor, learned: Tensor | None = None) -> Tensor:
        """One vector (B, P) for each text: the last layer's state at the end token, projected; arguments as above.

        SDXL conditions its time embedding on it (Podell et al. 2023, arXiv 2307.01952).
        """
        states = self._run(tokens, learned, skip=0)  # (B, L, D)
        ends = (tokens == self.tokenizer.eos).int().argmax(1).to(states.device)  # (B,), the first one
        return states[torch.arange(len(states), device=states.device), ends] @ self.model.text_projection

    def _run(self, tokens: Tensor, learned: Tensor | None, skip: int) -> Tensor:
        """States (B, L, D) behind all layers but the last `skip`, normalised."""
        model, mask, rows = self.model, self.model.attn_mask, self.embeddings
        rows = rows if learned is None else torch.cat([rows, learned.to(rows)])
        x = F.embedding(tokens.to(mask.device), rows) + model.positional_embedding  # (B, L, D)
        blocks = model.transformer.resblocks
        for block in blocks[: len(blocks) - skip]:
            x = block(x, attn_mask=mask)
        return model.ln_final(x)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Encodings (B, L, D) of a list of B strings."""
        return self.encode_tokens(self.tokenizer(texts))


def _check_fit(tokenizer: Tokenizer, vocab_size: int, max_length: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the text encoder only {vocab_size}")
    if tokenizer.context_length != max_length:
        raise UserError(
            f"the tokenizer's context_length is {tokenizer.context_length}, the text encoder's max_length {max_length}"
        )
