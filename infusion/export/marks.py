"""Marks in encodings of text, by which a UNet's hook recognises prompts with concepts."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

BITS, TAIL = 16, 32  # components of the first and the last token's encoding that make a marked row's key
KEPT = 100_000  # keys that are kept, about 13 for each prompt
Tokens = Sequence[str | None]  # the token at each place of a text; None is of no concept


class Marks:
    """What was written into encodings, and what it means.

    Args:
        unet: that reads them. length: of the text encoder; encodings of long prompts are in chunks of it.
    """

    def __init__(self, unet: nn.Module, length: int) -> None:
        self.unet, self.length = unet, length
        self.known: dict[bytes, tuple[Tokens, Tensor]] = {}  # key -> token at each place, and what was there
        self.count, self.lock = 0, threading.Lock()

    @torch.no_grad()
    def write(self, tokens: Tokens, states: Sequence[Tensor]) -> None:
        """Where there is a concept, write a number of its own into each state (L, D), and remember what it means.

        A bit is the smallest change of one component of the first token's encoding, which says nothing of the prompt.
        Otherwise "a cat" and "a <rex>" could not be told apart, or two concepts of one noun.
        """
        if not any(tokens):
            return
        with self.lock:
            self.count = self.count % (2**BITS - 1) + 1
            bits = [self.count >> bit & 1 for bit in range(BITS)]
            for state in states:
                first, eps = state[0, :BITS], torch.finfo(self.key_dtype(state)).eps
                original = first.clone()
                first += 2 * eps * first.abs().clamp(min=1e-3) * torch.tensor(bits, device=state.device)
                self.known[self.keys(state[None])[0][0]] = tokens, original
            while len(self.known) > KEPT:
                del self.known[next(iter(self.known))]

    def key_dtype(self, text: Tensor) -> torch.dtype:
        """The coarser of the encodings' and the UNet's type: what survives the way from one to the other."""
        return max(text.dtype, self.unet.dtype, key=lambda dtype: torch.finfo(dtype).eps)

    def keys(self, text: Tensor) -> list[list[bytes]]:
        """A key for each row (R, L, D) and each chunk of the text encoder's length."""
        stop = text.shape[1] // self.length * self.length
        ends = text[:, 0 : stop : self.length, :BITS], text[:, self.length - 1 : stop : self.length, :TAIL]
        keys = torch.cat(ends, dim=-1).detach().to(self.key_dtype(text)).double().cpu().numpy()
        return [[key.tobytes() for key in row] for row in keys]

    def read(self, text: Tensor) -> tuple[Tensor, dict[tuple[int, int], Tokens]]:
        """Encodings without their marks, and the token at each place of each (row, chunk) that had one."""
        found, clean = {}, text.clone()
        for row, chunks in enumerate(self.keys(text)):
            for chunk, key in enumerate(chunks):
                if key in self.known:
                    found[row, chunk], original = self.known[key]
                    clean[row, chunk * self.length, :BITS] = original.to(text)
        return clean if found else text, found
