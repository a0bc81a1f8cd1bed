"""Text encoders of Stable Diffusion: CLIP's text tower (SD 1.x), OpenCLIP's (SD 2.x), and both side by side (SDXL)."""

from collections.abc import Sequence
from dataclasses import replace

import open_clip
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.models.attention import Context
from ldm.models.tokenizer import Tokenizer
from ldm.util.cli import UserError


class TextEncoder(nn.Module):
    """What the UNet and the methods know of a text encoder.

    Attributes:
        tokenizer: gives the ids that the methods take.
        width: D, of the encodings and of the input embeddings.
        vocab_size: V, of the table of input embeddings.
        pooled_width: P, of the vector that the UNet takes beside the encodings; None where it takes none.
    """

    tokenizer: Tokenizer
    width: int
    vocab_size: int
    pooled_width: int | None = None

    @property
    def embeddings(self) -> nn.Parameter:
        """The input embedding of every token id, (V, D); a pair of encoders has no such table, but `embed`."""
        raise NotImplementedError

    @property
    def widths(self) -> list[int]:
        """D, or of a pair of encoders the widths of both, whose vectors stand side by side."""
        return [self.width]

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings (T, D) of token ids (T,) int64, on any device."""
        return self.embeddings[ids.to(self.embeddings.device)]

    def encode_tokens(self, tokens: Tensor, learned: Tensor | None = None) -> Tensor:
        """Encodings (B, L, D) of token ids (B, L) int64, on any device; `learned` (T, D) embeds the ids from V on."""
        raise NotImplementedError

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Encodings (B, L, D) of a list of B strings."""
        return self.encode_tokens(self.tokenizer(texts))

    def context(self, tokens: Tensor, learned: Tensor | None = None) -> Context:
        """All that the UNet takes of B prompts; arguments as of `encode_tokens`, but for ids of n windows, (B, n·L).

        Each window is encoded by itself, and the UNet takes them side by side, (B, n·L, D).
        """
        rows = rearrange(tokens, "b (n l) -> (b n) l", l=self.tokenizer.context_length)
        text = rearrange(self.encode_tokens(rows, learned), "(b n) l d -> b (n l) d", b=len(tokens))
        attended = self.tokenizer.attended(tokens)
        return Context(text, attended=None if attended is None else attended.to(text.device))

    def conditioning(self, texts: Sequence[str]) -> Context:
        """All that the UNet takes of B strings, of which "" is no text: see `unconditional`."""
        return self.context(self.tokenizer(texts))

    def unconditional(self, negative_prompt: str = "") -> Context:
        """What classifier-free guidance guides away from, one row; a long prompt is read whole."""
        return self.context(self.tokenizer.windows([negative_prompt]))

    def comparable(self, encodings: Tensor) -> Tensor:
        """Encodings (…, D) as the gate compares them: here they have gone through the final norm already."""
        return encodings


class ClipText(TextEncoder):
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
        skip: number of last layers whose output is not taken; with any, the final norm is left out too (SDXL: 1).

    Raises:
        ValueError: tokenizer and model do not fit, or `skip` leaves no layer.
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
        skip: int = 0,
    ) -> None:
        super().__init__()
        vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        _check_fit(tokenizer, vocab_size, max_length, skip, layers)
        self.tokenizer = tokenizer
        self.width, self.vocab_size = hidden_size, vocab_size
        self.skip = skip
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
        return self.transformer["text_model"].embeddings.token_embedding.weight

    def encode_tokens(self, tokens: Tensor, learned: Tensor | None = None) -> Tensor:
        tower = self.transformer["text_model"]
        tokens, skipped = tokens.to(tower.embeddings.position_ids.device), self.skip > 0
        if learned is None:
            output = tower(input_ids=tokens, output_hidden_states=skipped)
        else:
            rows = torch.cat([self.embeddings, learned.to(self.embeddings)])
            table = tower.embeddings.token_embedding  # its weight may be parametrized: no other can be put in its place
            hook = table.register_forward_hook(lambda *_: F.embedding(tokens, rows))
            try:
                output = tower(input_ids=tokens.clamp(max=len(self.embeddings) - 1), output_hidden_states=skipped)
            finally:
                hook.remove()
        return output.hidden_states[-1 - self.skip] if skipped else output.last_hidden_state


class OpenClipText(TextEncoder):
    """OpenCLIP's text tower: penultimate layer, then the final norm (SD 2.x; Cherti et al. 2022, arXiv 2212.07143).

    Parameters are named `model.*`, as in the published checkpoints. The last layer and `text_projection` are for
    `pooled` alone; `logit_scale` is stored there too, and never used.

    Args:
        tokenizer: its `context_length` must be `max_length`.
        hidden_size: width D of the encodings.
        layers, heads: depth, and heads of each layer.
        max_length: number of positions L.
        vocab_size: number of token embeddings; None takes the tokenizer's.
        projection_size: width of the space shared with images; None takes `hidden_size`.
        skip: number of last layers that encodings do without.
        pools: encodings do without the final norm too, and what they do without runs for `pooled` (SDXL).

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
        pools: bool = False,
    ) -> None:
        super().__init__()
        vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        _check_fit(tokenizer, vocab_size, max_length, skip, layers)
        self.tokenizer = tokenizer
        self.width, self.vocab_size = hidden_size, vocab_size
        self.skip, self.pools = skip, pools
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
        return self.model.token_embedding.weight

    def encode_tokens(self, tokens: Tensor, learned: Tensor | None = None) -> Tensor:
        states = self._run(tokens, learned, self.skip)
        return states if self.pools else self.model.ln_final(states)

    def pooled(self, tokens: Tensor, learned: Tensor | None = None) -> Tensor:
        """One vector (B, P) for each text: the last layer's state at the end token, projected; arguments as above.

        SDXL conditions its time embedding on it (Podell et al. 2023, arXiv 2307.01952).
        """
        states = self.model.ln_final(self._run(tokens, learned, skip=0))  # (B, L, D)
        # the first end token, (B,): not the highest id, which a learned word has
        ends = (tokens == self.tokenizer.eos).int().argmax(1).to(states.device)
        return states[torch.arange(len(states), device=states.device), ends] @ self.model.text_projection

    def _run(self, tokens: Tensor, learned: Tensor | None, skip: int) -> Tensor:
        """States (B, L, D) behind all layers but the last `skip`."""
        model, mask, rows = self.model, self.model.attn_mask, self.embeddings
        rows = rows if learned is None else torch.cat([rows, learned.to(rows)])
        x = F.embedding(tokens.to(mask.device), rows) + model.positional_embedding  # (B, L, D)
        blocks = model.transformer.resblocks
        for block in blocks[: len(blocks) - skip]:
            x = block(x, attn_mask=mask)
        return x


class TextPair(TextEncoder):
    """SDXL's two text encoders (Podell et al. 2023, arXiv 2307.01952): encodings of both, one beside the other.

    A prompt is tokenised once, by the first tokenizer; the second encoder reads the same ids with its own padding. Both
    attend only to what came before, so a token has the same place in either. `pooled` is the second encoder's.

    Parameters are named `embedders.0.*` and `embedders.1.*`, as in the published checkpoints.

    Args:
        first: CLIP ViT-L, penultimate layer.
        second: OpenCLIP ViT-bigG, penultimate layer, with `pools`.

    Raises:
        ValueError: tokenizers of different vocabularies or lengths, or a second encoder that does not pool.
    """

    def __init__(self, first: ClipText, second: OpenClipText) -> None:
        super().__init__()
        read = [(text.vocab_size, text.tokenizer.vocab_size, text.tokenizer.context_length) for text in (first, second)]
        if read[0] != read[1]:
            raise UserError(f"both text encoders must read the same ids, and as many: {read[0]} and {read[1]}")
        if not second.pools:
            raise UserError("pools: must be true for the second text encoder")
        self.embedders = nn.ModuleList([first, second])
        self.tokenizer = first.tokenizer
        self.width, self.vocab_size = first.width + second.width, first.vocab_size
        self.pooled_width = second.model.text_projection.shape[1]

    @property
    def widths(self) -> list[int]:
        return [text.width for text in self.embedders]

    def embed(self, ids: Tensor) -> Tensor:
        return torch.cat([text.embed(ids) for text in self.embedders], dim=-1)

    def encode_tokens(self, tokens: Tensor, learned: Tensor | None = None) -> Tensor:
        return torch.cat([text.encode_tokens(*read) for text, read in self._read(tokens, learned)], dim=-1)

    def context(self, tokens: Tensor, learned: Tensor | None = None) -> Context:
        """As of any encoder; the pooled vector is that of the first window, as in AUTOMATIC1111 and compel."""
        _, (second, read) = self._read(tokens[:, : self.tokenizer.context_length], learned)
        return replace(super().context(tokens, learned), pooled=second.pooled(*read))

    def conditioning(self, texts: Sequence[str]) -> Context:
        """All zeros for an empty text, as SDXL was trained; anything else is encoded, also a space."""
        empty = torch.tensor([not text for text in texts])
        context = self.context(self.tokenizer(texts))
        return context.map(lambda rows: rows.masked_fill(empty.view(-1, *[1] * (rows.dim() - 1)).to(rows.device), 0))

    def unconditional(self, negative_prompt: str = "") -> Context:
        """As `conditioning` for an empty negative prompt."""
        return super().unconditional(negative_prompt) if negative_prompt else self.conditioning([""])

    def comparable(self, encodings: Tensor) -> Tensor:
        """Each encoder's part under its own final norm, which SD 1.5's and 2.1's encodings have gone through."""
        first, second = self.embedders
        norms = first.transformer["text_model"].final_layer_norm, second.model.ln_final
        parts = encodings.to(norms[0].weight).split([first.width, second.width], dim=-1)
        return torch.cat([norm(part) for norm, part in zip(norms, parts, strict=True)], dim=-1)

    def _read(self, tokens: Tensor, learned: Tensor | None) -> list[tuple[TextEncoder, tuple[Tensor, Tensor | None]]]:
        """Each encoder with the ids and the learned embeddings that it reads."""
        first, second = self.embedders
        ended = (tokens == self.tokenizer.eos).cumsum(1) > 0
        padding = ended.roll(1, dims=1)  # what is behind the first end token
        padding[:, 0] = False
        parts = [None, None] if learned is None else learned.split([first.width, second.width], dim=-1)
        ids = tokens, tokens.masked_fill(padding, second.tokenizer.pad)
        return [(text, read) for text, *read in zip(self.embedders, ids, parts, strict=True)]


def _check_fit(tokenizer: Tokenizer, vocab_size: int, max_length: int, skip: int, layers: int) -> None:
    if not 0 <= skip < layers:
        raise UserError(f"skip must lie between 0 and {layers - 1}, not {skip}")
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the text encoder only {vocab_size}")
    if tokenizer.context_length != max_length:
        raise UserError(
            f"the tokenizer's context_length is {tokenizer.context_length}, the text encoder's max_length {max_length}"
        )
