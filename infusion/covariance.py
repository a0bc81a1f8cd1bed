"""The covariance of text encodings, C, whose inverse weighs the gate (docs/method.md, eq. 4; Perfusion, 2305.01644).

The gate compares the encodings of words with the concept's, so C is that of words too: the begin token, the end token
and the padding, which are most of the 77 places and nearly the same in every caption, are left out. (Perfusion's
release sums over all 77 places.)
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from infusion.gate import fingerprint
from ldm.models.tokenizer import Tokenizer
from ldm.util.cli import UserError
from ldm.util.config import find
from ldm.util.files import encoding_of
from ldm.weights.checkpoint import write
from ldm.weights.files import TensorFile

FORMAT = "infusion-covariance"
VERSION = 1
NAME = "inverse_covariance"  # of the file's only tensor
MOST = 2e6  # condition number up to which C⁻¹ survives being rounded to float32


@dataclass(frozen=True)
class Covariance:
    """C, (D, D) float64 on the CPU, and how many captions and word tokens it is of.

    Attributes:
        cut: how many of the captions are longer than the text encoder reads; what is beyond is not in C.
    """

    matrix: Tensor
    captions: int
    tokens: int
    cut: int


@torch.no_grad()
def estimate(text_encoder: nn.Module, captions: Iterable[str], batch_size: int = 32) -> Covariance:
    """`C = (1 / n) Σ_j e_j e_jᵀ`, uncentred, over the n word tokens of captions (eq. 4).

    Args:
        text_encoder: as in `ldm.models.text`, with `encode_tokens`, `tokenizer` and `width`.
        captions: any number of strings, which are read and encoded a batch at a time.
        batch_size: captions encoded at a time; does not change the result.

    Raises:
        ValueError: an encoding that is not finite, or fewer tokens than D, so that C is singular.
    """
    width, captions = text_encoder.width, iter(captions)
    total, seen, tokens, cut = torch.zeros(width, width, dtype=torch.float64), 0, 0, 0
    while batch := list(islice(captions, batch_size)):
        ids = text_encoder.tokenizer(batch)  # (B, L)
        encodings = text_encoder.comparable(text_encoder.encode_tokens(ids))  # (B, L, D)
        words = word_tokens(text_encoder.tokenizer, ids).to(encodings.device)
        counted = encodings[words].cpu().double()  # (n, D)
        if not counted.isfinite().all():
            raise UserError("the text encoder gives values that are not finite")
        total += counted.mT @ counted
        seen, tokens = seen + len(batch), tokens + len(counted)
        cut += sum(text_encoder.tokenizer.beyond(caption) != "" for caption in batch)
    if tokens < width:
        raise UserError(
            f"{seen:,} captions with {tokens:,} word tokens are too few: the covariance of encodings {width} wide is "
            f"singular below {width:,} tokens, and rough below many times that; give more captions"
        )
    return Covariance(total / tokens, seen, tokens, cut)


def word_tokens(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """True, (B, L) bool, on the tokens between the begin token and the first end token; ids are (B, L) int64."""
    words = (tokens == tokenizer.eos).cumsum(1) == 0
    words[:, 0] = False
    return words


def invert(matrix: Tensor, ridge: float = 0.0) -> tuple[Tensor, float, float]:
    """(C + ridge · mean eigenvalue · I)⁻¹, and the condition numbers of C without and with the ridge.

    A text encoder ends in a LayerNorm, which fixes one direction of its encodings: one eigenvalue of C is far below the
    others, for any number of captions. No eigenvalue is above D times the mean, so a ridge of 0.001 always does.

    Args:
        matrix: C, (D, D), symmetric, float64.
        ridge: at least 0; as a share of C's mean eigenvalue.

    Returns:
        (D, D) float64, exactly symmetric; condition numbers, infinite for what is singular to rounding.

    Raises:
        ValueError: a ridge below 0, or a condition number above `MOST` with it; the message says which ridge will do.
    """
    if not 0 <= ridge < math.inf:
        raise UserError(f"ridge: must be a number of at least 0, not {ridge}")
    values, vectors = torch.linalg.eigh(matrix)  # ascending
    mean, rounding = values.mean(), len(values) * torch.finfo(values.dtype).eps * values[-1]
    raised = values + ridge * mean
    before, after = ((own[-1] / own[0]).item() if own[0] > rounding else math.inf for own in (values, raised))
    if after > MOST:
        enough = f"{2 * values[-1].item() / MOST / mean.item():.0e}"
        raise UserError(
            f"the covariance's condition number is {after:.1e}, and above {MOST:.0e} the gate would be rounding "
            f"errors: give a ridge of {enough} or more"
        )
    inverse = (vectors / raised) @ vectors.mT
    return (inverse + inverse.mT) / 2, before, after


class InverseCovariance:
    """C⁻¹ from a file of `scripts/estimate_C_inv.py`, or the identity.

    Args:
        path: the file, relative to the working directory or else to the repository; None is the identity.

    Attributes:
        matrix: (D, D) float32, symmetric positive definite; None is the identity.
        architecture: of the base model whose text encoder it is of.
        base_hash: sha256 of the file with that text encoder. None where either is not known.

    Raises:
        ValueError: the file is missing, damaged, no covariance file, of a newer version, or its matrix is not square,
            finite, symmetric and positive definite; the message names the file.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path, self.matrix, metadata = path, None, {}
        if path is not None:
            self.matrix, metadata = _read(path)
        self.architecture, self.base_hash = metadata.get("base_architecture"), metadata.get("base_sha256") or None

    @property
    def fingerprint(self) -> str:
        """As in `infusion.gate.fingerprint`."""
        return fingerprint(self.matrix)

    def check_base(self, architecture: str, base_hash: str | None, width: int) -> None:
        """Warn when C is of another checkpoint's text encoder; the identity suits every base.

        Args:
            architecture: of the base model.
            base_hash: sha256 of the file that its text encoder came from (`StableDiffusion.digests`); None for none.
            width: D of its text encodings.

        Raises:
            ValueError: C is of another architecture or width.
        """
        if self.matrix is None:
            return
        if self.architecture != architecture or len(self.matrix) != width:
            here, there = f"{architecture!r}, {width} wide", f"{self.architecture!r}, {len(self.matrix)} wide"
            raise UserError(f"{self.path}: the covariance of {there}, does not fit {here}")
        if base_hash is not None and self.base_hash != base_hash:
            message = f"{self.path}: the covariance is of another checkpoint of {architecture!r} than the one in use"
            warnings.warn(message, stacklevel=2)


def save_inverse(path: str | Path, inverse: Tensor, facts: Mapping[str, object]) -> None:
    """Writes C⁻¹ (D, D) as float32, with `facts` as metadata, in one go. Makes the folder if need be."""
    metadata = {"format": FORMAT, "format_version": VERSION} | dict(facts)
    write(Path(path), {NAME: inverse.to(torch.float32)}, {name: str(value) for name, value in metadata.items()})


def read_captions(path: str | Path) -> Iterator[str]:
    """The lines of a text file, read as they are wanted, stripped, without empty ones; UserError as `encoding_of`."""
    try:
        with open(path, encoding=encoding_of(path)) as file:
            yield from filter(None, map(str.strip, file))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as text: save it as UTF-8") from error


def _read(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    file = find(path)
    if not file.is_file():
        raise UserError(f"{path}: there is no such covariance file")
    with TensorFile(file) as content:
        metadata = content.metadata
        kind = metadata.get("format"), metadata.get("format_version")
        if kind != (FORMAT, str(VERSION)) or list(content.shapes) != [NAME]:
            raise UserError(f"{path}: no covariance file of version {VERSION}")
        matrix = content.read(NAME)
    if matrix.ndim != 2 or len(matrix) != matrix.shape[1] or not matrix.is_floating_point():
        raise UserError(f"{path}: {tuple(matrix.shape)} of {matrix.dtype} is no square matrix")
    # of a matrix with NaN, both are false
    definite = torch.linalg.cholesky_ex(matrix.double()).info == 0
    if not definite or not torch.allclose(matrix, matrix.mT, rtol=1e-5, atol=0):
        raise UserError(
            f"{path}: the matrix is not finite, symmetric and positive definite, as an inverse covariance is"
        )
    return matrix.float(), metadata
