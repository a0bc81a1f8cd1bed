"""The compact form of a concept file: quantised, entropy-coded, and at most 11,264 bytes in all, or as many for every
12,480 numbers where there are more (docs/concept-file.md).

**Quantisation.** Every number is a multiple of one step Δ: x ≈ Δ q with q = round(x / Δ). For a given number of bits,
the same step in all layers makes the sum of squared errors smallest (reverse water-filling: Cover and Thomas, Elements
of Information Theory, section 10.3.3). Δ is as fine as the file's limit allows.

**Entropy coding.** The numbers of a layer become one whole number x by an asymmetric numeral system (Duda 2013, arXiv
1311.2540, the variant rANS), beginning with x = 0 and the layer's last number. With f(q) the weight of q, c(q) the sum
of the weights below q, and M the sum of all:

    encode q:  x ← ⌊x / f(q)⌋ M + c(q) + x mod f(q)
    decode q:  c(q) ≤ x mod M < c(q) + f(q),  x ← f(q) ⌊x / M⌋ + x mod M - c(q)

A number costs log₂(M / f(q)) bits. The weights are Student's t distribution with three degrees of freedom, in whole
numbers, so that they are the same on every machine:

    f(q) = 1 + ⌊2¹⁶ a² / (a + q²)²⌋  for |q| ≤ peak,  with a = `spread`, about 3 times the layer's mean of q²
"""

import json
import math
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ldm.util.cli import UserError
from ldm.weights.files import serialise

LIMIT, PER = 11_264, 12_480  # bytes of a whole file, and for how many numbers (SD 1.5)
# Δ as a share of the numbers' root mean square, from the finest to the coarsest: relative errors of 0.45 % to 2.6 %
STEPS = tuple(2 ** (i / 8) / 64 for i in range(21))
SPREADS = tuple(3 * 2 ** (i / 2) for i in range(-5, 4))  # a, as multiples of the mean of q²
NUMBERS, PEAK = 100_000, 2**13 - 1  # of a file and of |q|, at most
DAMAGES = (zlib.error, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def limit(numbers: int) -> int:
    """Bytes of a whole file of so many numbers, at most."""
    return max(LIMIT, LIMIT * numbers // PER)


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A whole safetensors file, with the finest step that fits. What `decode` gives is encoded again to the same bytes.

    Args:
        tensors: layer name -> finite numbers, float32.
        metadata: what the file says beside them.

    Raises:
        ValueError: numbers and metadata that do not fit into the limit.
    """
    layers = [tensor.double().flatten().numpy() for tensor in tensors.values()]
    numbers = np.concatenate(layers)
    room = limit(len(numbers))
    rms = math.sqrt(np.mean(numbers**2))
    for step in (_common(numbers), *(_short(share * rms) for share in STEPS)):
        if len(numbers) > NUMBERS or abs(numbers).max() > PEAK * step:
            continue
        quantised = [np.rint(layer / step).astype(np.int64) for layer in layers]
        common = int(np.gcd.reduce(np.concatenate(quantised))) or 1
        quantised = [q // common for q in quantised]
        models, bits = zip(*map(_model, quantised), strict=True)
        if sum(bits) / 8 < room:
            described, content = {}, b""
            for (name, tensor), q, model in zip(tensors.items(), quantised, models, strict=True):
                packed = pack(q.tolist(), weights(*model))
                described[name] = [list(tensor.shape), *model, len(packed)]
                content += packed
            description = {"step": step * common, "crc32": checksum(metadata, content), "layers": described}
            text = json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode()
            streams = {"layers": zlib.compress(text, 9), "numbers": content}
            file = serialise({name: _bytes(stream) for name, stream in streams.items()}, metadata)
            if len(file) <= room:
                return file
    raise UserError(
        f"{len(numbers):,} numbers and their metadata do not fit into a compact file, which has at most {room:,} "
        "bytes: shorten the templates or the superclass word, or choose the form half"
    )


def decode(streams: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Layer name -> float32 numbers, of a compact file's two tensors; `metadata` is the file's own.

    Raises:
        ValueError: damaged, or nothing that `encode` writes.
    """
    if any(stream.dtype != torch.uint8 for stream in streams.values()) or streams.keys() != {"layers", "numbers"}:
        raise UserError("damaged: a compact file has the two tensors `layers` and `numbers` of bytes")
    try:
        content = streams["numbers"].numpy().tobytes()
        description = json.loads(zlib.decompress(streams["layers"].numpy().tobytes()))
        if checksum(metadata, content) != description["crc32"]:
            raise UserError("the checksum is that of other numbers and metadata")
        if not 0 < description["step"] < math.inf:
            raise UserError("its step is no number above 0")
        tensors, start, room = {}, 0, NUMBERS
        for name, (shape, peak, spread, length) in description["layers"].items():
            count, end = math.prod(shape), start + length
            room -= count
            shaped = len(shape) <= 8 and all(0 <= side <= NUMBERS for side in shape)
            coded = 0 <= peak <= PEAK and spread >= 1 and start <= end <= len(content)
            if not (shaped and coded and room >= 0):
                raise UserError("a layer's shape, peak, spread or length is out of range")
            q = unpack(content[start:end], count, weights(peak, spread))
            tensors[name] = (torch.tensor(q, dtype=torch.float64) * description["step"]).float().reshape(shape)
            start = end
        if start != len(content):
            raise UserError("the layers' lengths are not that of `numbers`")
        return tensors
    except DAMAGES as error:
        raise UserError(f"damaged: {error}") from error


def weights(peak: int, spread: int) -> list[int]:
    """f(q) for q from -peak to peak."""
    half = [1 + (spread * spread << 16) // (spread + q * q) ** 2 for q in range(peak + 1)]
    return half[:0:-1] + half


def pack(quantised: Sequence[int], weights: Sequence[int]) -> bytes:
    """The numbers of a layer as one whole number, little-endian."""
    below = [0, *accumulate(weights)]  # c(q), and M at the end
    peak, state = len(weights) // 2, 0
    for q in reversed(quantised):
        turns, rest = divmod(state, weights[q + peak])
        state = turns * below[-1] + below[q + peak] + rest
    return state.to_bytes((state.bit_length() + 7) // 8, "little")


def unpack(packed: bytes, count: int, weights: Sequence[int]) -> list[int]:
    """`count` numbers of a layer; raises ValueError where `pack` was given more."""
    below = [0, *accumulate(weights)]
    state, quantised = int.from_bytes(packed, "little"), []
    for _ in range(count):
        turns, rest = divmod(state, below[-1])
        index = bisect_right(below, rest) - 1
        state = weights[index] * turns + rest - below[index]
        quantised.append(index - len(weights) // 2)
    if state:
        raise UserError("a layer holds more than its numbers")
    return quantised


def checksum(metadata: Mapping[str, str], content: bytes) -> int:
    return zlib.crc32(json.dumps(dict(metadata), sort_keys=True).encode() + content)


def _common(numbers: np.ndarray) -> float:
    """The coarsest Δ of which all numbers are multiples: with it, nothing is lost of what was compact before."""
    ratios = [value.as_integer_ratio() for value in numbers.tolist()]
    scale = max(below for _, below in ratios)  # a power of 2, as they all are
    return math.gcd(*(above * (scale // below) for above, below in ratios)) / scale or 1.0


def _short(step: float) -> float:
    """A step of 8 binary digits, so that Δ q is exact in float32."""
    mantissa, exponent = math.frexp(step)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def _model(quantised: np.ndarray) -> tuple[tuple[int, int], float]:
    """Peak, and the spread that takes the fewest bits; that many bits, Σ log₂(M / f(q))."""
    peak = int(abs(quantised).max())
    squares = np.arange(-peak, peak + 1.0) ** 2
    models = []
    for share in SPREADS:
        spread = max(1, round(share * float(np.mean(quantised**2))))
        weight = 1 + 2**16 / (1 + squares / spread) ** 2
        bits = len(quantised) * np.log2(weight.sum()) - np.log2(weight[quantised + peak]).sum()
        models.append(((peak, spread), float(bits)))
    return min(models, key=lambda model: model[1])


def _bytes(stream: bytes) -> Tensor:
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8) if stream else torch.empty(0, dtype=torch.uint8)
