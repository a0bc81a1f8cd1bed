"""CLIP's byte-pair tokenizer, from the table that open_clip ships: no hub, no download."""

from collections.abc import Sequence
from typing import Literal

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from ldm.util.cli import UserError, check_range
from ldm.util.templates import short

BYTES = 512  # 256 bytes, and the same 256 as the end of a word
WINDOWS = 8  # of a text that is read whole, at most


class Tokenizer:
    """Text to CLIP token ids, framed by a begin and an end token and padded to a fixed length.

    Args:
        merges: keep only the first `merges` merges of CLIP's table, for a small vocabulary; ids stay dense:
            512 bytes, the merges, begin, end. None keeps all of them, and the ids are CLIP's own.
        context_length: length L of every row, begin and end included.
        pad: what follows the end token: the end token again ("end", SD 1.5) or id 0 ("zero", OpenCLIP).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, merges: int | None = None, context_length: int = 77, pad: Literal["end", "zero"] = "end"
    ) -> None:
        check_range("context_length", context_length, 2)
        self.table = SimpleTokenizer(context_length=context_length)
        if merges is not None:
            _keep_merges(self.table, merges)
        self.context_length = context_length
        self.vocab_size: int = self.table.vocab_size
        self.bos: int = self.table.sot_token_id
        self.eos: int = self.table.eot_token_id
        self.pad: int = self.eos if pad == "end" else 0

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no begin, no end, no padding, not truncated."""
        return self.table.encode(text)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, L) int64 ids; a text that is too long is cut, and its row still closes with the end token.

        Raises:
            ValueError: `texts` is one string instead of a list of strings.
        """
        if isinstance(texts, str):
            raise ValueError(f"expected a list of strings, not one string: {texts!r}")
        ids = torch.full((len(texts), self.context_length), self.pad, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            tokens = [self.bos, *self.encode(text)[: self.context_length - 2], self.eos]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def windows(self, texts: Sequence[str]) -> Tensor:
        """Ids of whole texts, (B, n·L) int64: what does not fit into one row goes on in the next, framed as a row is.

        So do AUTOMATIC1111 and compel with long prompts. A text of fewer windows than another of the list ends in
        windows of the empty text, which `attended` tells.

        Raises:
            ValueError: a text of more than `WINDOWS`; the message has the part that is beyond.
        """
        inner, rows = self.context_length - 2, []
        for text in texts:
            if beyond := self.beyond(text, WINDOWS):
                most = f"the {WINDOWS * inner} tokens that are read"
                raise UserError(f"{short(text)} is longer than {most}: {short(beyond)} is beyond")
            ids = self.encode(text)
            rows.append([])
            for start in range(0, max(len(ids), 1), inner):
                row = [self.bos, *ids[start : start + inner], self.eos]
                rows[-1] += row + [self.pad] * (self.context_length - len(row))
        length, empty = max(map(len, rows)), self([""])[0].tolist()
        return torch.tensor([row + empty * ((length - len(row)) // self.context_length) for row in rows])

    def attended(self, ids: Tensor) -> Tensor | None:
        """Which of the ids of `windows` are of the texts, bool (B, n·L); None where all are.

        Only they count: attention to windows of the empty text would make a prompt depend on those beside it.
        """
        if ids.shape[1] == self.context_length:
            return None
        rows = ids.unflatten(1, (-1, self.context_length))  # (B, n, L)
        read = (rows != self([""]).to(ids.device)).any(-1)
        read[:, 0] = True  # of an empty text, too
        return None if read.all() else read.repeat_interleave(self.context_length, 1)

    def beyond(self, text: str, windows: int = 1) -> str:
        """The part of a text that does not fit into so many rows, as the tokenizer spells it; "" where all does."""
        return self.table.decode(self.encode(text)[windows * (self.context_length - 2) :]).strip()


def _keep_merges(table: SimpleTokenizer, merges: int) -> None:
    """Cut the table to its `merges` most frequent merges and renumber the ids without gaps."""
    check_range("merges", merges, 0, len(table.bpe_ranks))
    specials = [table.decoder[i] for i in table.all_special_ids]
    vocabulary = [table.decoder[i] for i in range(BYTES + merges)] + specials
    table.bpe_ranks = {pair: rank for pair, rank in table.bpe_ranks.items() if rank < merges}
    table.encoder = {token: i for i, token in enumerate(vocabulary)}
    table.decoder = dict(enumerate(vocabulary))
    table.all_special_ids = [table.encoder[token] for token in specials]
    table.sot_token_id, table.eot_token_id = table.all_special_ids
    table.vocab_size = len(vocabulary)
