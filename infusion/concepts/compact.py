"""The compact form of a concept file: quantised, entropy-coded, and at most 11,264 bytes in all (docs/concept-file.md).

**Quantisation.** Every number of every layer is a multiple of one step Δ: x ≈ Δ q with q = round(x / Δ), whose error is
Δ² / 12 on average. Among all ways to share a number of bits between layers, the one of equal error everywhere has the
smallest sum of squares (reverse water-filling: Cover and Thomas, Elements of Information Theory, section 10.3.3).
Δ is as fine as the file's limit allows.

**Entropy coding.** The numbers of a layer become one whole number x by an asymmetric numeral system (Duda 2013, arXiv
1311.2540, the variant rANS), beginning with x = 0 and the layer's last number. With f(q) the weight of q, c(q) the sum
of the weights below q, and M the sum of all:

    encode q:  x ← ⌊x / f(q)⌋ M + c(q) + x mod f(q)
    decode q:  c(q) ≤ x mod M < c(q) + f(q),  x ← f(q) ⌊x / M⌋ + x mod M - c(q)

A number costs log₂(M / f(q)) bits. The weights are Student's t distribution with three degrees of freedom, whose tails
are heavier than a Gaussian's, in whole numbers, so that they are the same on every machine:

    f(q) = 1 + ⌊2¹⁶ a² / (a + q²)²⌋  for |q| ≤ peak,  with a = `spread`, about 3 times the layer's mean of q²
"""

import json
import math
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ldm.util.cli import UserError

VERSION = 2  # the first `format_version` that has this form
LIMIT = 11_264  # bytes of a whole file
# Δ as a share of the numbers' root mean square, from the finest to the coarsest: relative errors of 0.45 % to 2.6 %
STEPS = tuple(2 ** (i / 8) / 64 for i in range(21))
SPREADS = tuple(3 * 2 ** (i / 2) for i in range(-5, 4))  # of a, as multiples of the mean of q²
# what a file may ask its reader to make
NUMBERS, PEAK, WEIGHTS, DESCRIPTION = 50_000, 2**13 - 1, 2**19, 2**16


@dataclass(frozen=True)
class Layer:
    """How one layer is stored.

    Attributes:
        shape: of the tensor.
        peak: the largest |q|; 0 takes no bytes.
        spread: a of the weights, at least 1.
        length: bytes of x, little-endian.

    Raises:
        ValueError: values that no encoder writes.
    """

    shape: tuple[int, ...]
    peak: int
    spread: int
    length: int = 0

    def __post_init__(self) -> None:
        values = (*self.shape, self.peak, self.spread - 1, self.length)
        bounds = (*(NUMBERS for _ in self.shape), PEAK, 2**40, LIMIT)
        if len(self.shape) > 8 or not all(0 <= value <= bound for value, bound in zip(values, bounds, strict=True)):
            raise UserError("a layer's shape, peak, spread or length is out of range")

    def weights(self) -> list[int]:
        """f(q) for q from -peak to peak."""
        a = self.spread
        half = [1 + (a * a << 16) // (a + q * q) ** 2 for q in range(self.peak + 1)]
        return half[:0:-1] + half


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A whole file, with the finest step that fits. What `decode` gives is encoded again to the same bytes.

    Args:
        tensors: layer name -> finite numbers, float32.
        metadata: what the file says beside them.

    Raises:
        ValueError: numbers and metadata that do not fit into the limit.
    """
    numbers = [tensor.numpy().astype(np.float64).ravel() for tensor in tensors.values()]
    text = len(_json(metadata).encode())
    for step, quantised in _candidates(numbers):
        layers = [_model(q, tensor.shape) for q, tensor in zip(quantised, tensors.values(), strict=True)]
        if layers and text + sum(map(_bits, layers, quantised)) / 8 <= LIMIT:
            file = _file(step, dict(zip(tensors, layers, strict=True)), quantised, metadata)
            if len(file) <= LIMIT:
                return file
    count = sum(map(len, numbers))
    raise UserError(
        f"{count:,} numbers and {text:,} bytes of metadata do not fit into a compact file, which has at most {LIMIT:,} "
        "bytes: shorten the templates or the superclass word, or choose the form half"
    )


def decode(streams: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Layer name -> float32 numbers, of a compact file's two tensors; `metadata` is the file's own.

    Raises:
        ValueError: damaged, or nothing that `encode` writes.
    """
    kinds = {name: (stream.dtype, stream.ndim) for name, stream in streams.items()}
    if kinds != dict.fromkeys(("layers", "numbers"), (torch.uint8, 1)):
        raise UserError("damaged: a compact file has the two tensors `layers` and `numbers` of bytes")
    content = streams["numbers"].numpy().tobytes()
    step, checksum, layers = _described(streams["layers"].numpy().tobytes())
    if checksum != _checksum(metadata, content):
        raise UserError("damaged: the checksum is that of other numbers and metadata")
    if sum(layer.length for layer in layers.values()) != len(content):
        raise UserError("damaged: the layers' lengths are not that of `numbers`")
    if sum(math.prod(layer.shape) for layer in layers.values()) > NUMBERS:
        raise UserError(f"damaged: a compact file has at most {NUMBERS:,} numbers")
    if sum(2 * layer.peak + 1 for layer in layers.values()) > WEIGHTS:
        raise UserError("damaged: the layers' peaks are out of range")
    tensors, start = {}, 0
    for name, layer in layers.items():
        state = int.from_bytes(content[start : start + layer.length], "little")
        start += layer.length
        q = np.array(_unpack(state, math.prod(layer.shape), layer.weights()), np.float64)
        with np.errstate(over="ignore"):  # a step that is too large makes numbers that `Concept` refuses
            tensors[name] = torch.from_numpy((step * q).astype(np.float32)).reshape(layer.shape)
    return tensors


def _candidates(numbers: Sequence[np.ndarray]) -> Iterator[tuple[float, list[np.ndarray]]]:
    """Δ and q of every layer, from the finest to the coarsest; first of all without a loss, where that can be."""
    yield from _lossless(numbers)
    everything = np.concatenate(numbers)
    rms = math.sqrt(np.mean(everything**2))
    for share in STEPS if rms else ():
        mantissa, exponent = math.frexp(share * rms)
        step = math.ldexp(round(mantissa * 256), exponent - 8)  # of 8 bits, so that Δ q is exact in float32
        quantised = [np.rint(layer / step).astype(np.int64) for layer in numbers]
        common = int(np.gcd.reduce(np.concatenate(quantised))) or 1
        yield from _within(step * common, [layer // common for layer in quantised])


def _lossless(numbers: Sequence[np.ndarray]) -> Iterator[tuple[float, list[np.ndarray]]]:
    """The coarsest Δ of which all the numbers are multiples, which makes encoding what was decoded idempotent."""
    ratios = [[value.as_integer_ratio() for value in layer.tolist()] for layer in numbers]
    scale = max((below for layer in ratios for _, below in layer), default=1)  # a power of 2
    whole = [[above * (scale // below) for above, below in layer] for layer in ratios]
    common = math.gcd(*(value for layer in whole for value in layer)) or scale
    if all(abs(value) <= PEAK * common for layer in whole for value in layer):
        yield from _within(common / scale, [np.array([v // common for v in layer], np.int64) for layer in whole])


def _within(step: float, quantised: list[np.ndarray]) -> Iterator[tuple[float, list[np.ndarray]]]:
    peaks = [int(abs(layer).max(initial=0)) for layer in quantised]
    if max(peaks) <= PEAK and sum(2 * peak + 1 for peak in peaks) <= WEIGHTS and sum(map(len, quantised)) <= NUMBERS:
        yield step, quantised


def _model(quantised: np.ndarray, shape: Sequence[int]) -> Layer:
    """The layer with the spread that takes the fewest bits."""
    peak = int(abs(quantised).max(initial=0))
    mean = float(np.mean(quantised**2)) if len(quantised) else 0.0
    layers = [Layer(tuple(shape), peak, max(1, round(share * mean))) for share in SPREADS]
    return min(layers, key=lambda layer: _bits(layer, quantised))


def _bits(layer: Layer, quantised: np.ndarray) -> float:
    """Σ log₂(M / f(q))."""
    q = np.arange(-layer.peak, layer.peak + 1.0)
    weights = 1 + 2**16 / (1 + q**2 / layer.spread) ** 2
    return float(len(quantised) * np.log2(weights.sum()) - np.log2(weights[quantised + layer.peak]).sum())


def _file(
    step: float, layers: Mapping[str, Layer], quantised: Sequence[np.ndarray], metadata: Mapping[str, str]
) -> bytes:
    """A safetensors file. (The library's own writer puts metadata into another order each time.)"""
    described, content = {}, b""
    for (name, layer), q in zip(layers.items(), quantised, strict=True):
        state = _pack(q.tolist(), layer.weights())
        packed = state.to_bytes((state.bit_length() + 7) // 8, "little")
        described[name] = [*astuple(layer)[:3], len(packed)]
        content += packed
    description = {"step": step, "crc32": _checksum(metadata, content), "layers": described}
    header, data = {"__metadata__": dict(metadata)}, b""
    for name, stream in {"layers": zlib.compress(_json(description).encode(), 9), "numbers": content}.items():
        place = [len(data), len(data) + len(stream)]
        header[name] = {"dtype": "U8", "shape": [len(stream)], "data_offsets": place}
        data += stream
    text = _json(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _described(stream: bytes) -> tuple[float, int, dict[str, Layer]]:
    """Δ, the checksum and the layers."""
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(stream, DESCRIPTION)
        if not inflate.eof or inflate.unused_data:
            raise UserError("it does not end where it should")
        description = json.loads(text)
        step, checksum = description["step"], description["crc32"]
        layers = {name: Layer(tuple(shape), *rest) for name, (shape, *rest) in description["layers"].items()}
        if not (isinstance(step, float) and 0 < step < math.inf):
            raise UserError("its step is no number above 0")
        if any(type(value) is not int for layer in layers.values() for value in (*layer.shape, *astuple(layer)[1:])):
            raise UserError("a layer has a value that is no whole number")
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"damaged: the stream `layers` cannot be read ({error})") from error
    return step, checksum, layers


def _pack(quantised: Sequence[int], weights: Sequence[int]) -> int:
    below = [0, *accumulate(weights)]  # c(q), and M at the end
    peak, state = len(weights) // 2, 0
    for q in reversed(quantised):
        turns, rest = divmod(state, weights[q + peak])
        state = turns * below[-1] + below[q + peak] + rest
    return state


def _unpack(state: int, count: int, weights: Sequence[int]) -> list[int]:
    below = [0, *accumulate(weights)]
    quantised = []
    for _ in range(count):
        turns, rest = divmod(state, below[-1])
        index = bisect_right(below, rest) - 1
        state = weights[index] * turns + rest - below[index]
        quantised.append(index - len(weights) // 2)
    if state:
        raise UserError("damaged: a layer holds more than its numbers")
    return quantised


def _checksum(metadata: Mapping[str, str], content: bytes) -> int:
    return zlib.crc32(json.dumps(dict(metadata), sort_keys=True).encode() + content)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
