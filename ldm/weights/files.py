"""Files of tensors, by their content and not by their ending: read one tensor at a time, and nothing of them is run.

A `.safetensors` file holds tensors and nothing else. A `.ckpt` file is a pickle, which is a program: `torch.load` reads
it with `weights_only`, which runs nothing but the functions by which torch makes tensors. Whatever else the pickle
names (callbacks of Lightning, numpy's scalars, …) becomes a stand-in that does nothing.
"""

import json
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldm.util.cli import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
          "BOOL": torch.bool}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CONCEPT = "infusion-concept"  # `format` in the metadata of this project's concept files
HEADER = 2**24  # bytes of a safetensors file's header; safetensors takes 100 MB, which takes a minute to read
LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how files of torch before 1.6 begin
OTHERS = {  # how other files begin -> what they are
    b"version https://git-lfs": "a Git LFS pointer: get the file itself by `git lfs pull`",
    b"<": "a web page, not the file that it links to: download it again",
}
NESTED = 8  # mappings within each other
LEVELS = ("state_dict", "string_to_param")  # under which tensors are nested: Lightning's files, AUTOMATIC1111's words
DICTS = ("defaultdict", "AttributeDict")  # kinds of dict in Lightning's files
FORBIDDEN = (  # what no checkpoint names
    *("os.", "posix.", "nt.", "sys.", "subprocess.", "commands.", "importlib.", "runpy."),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.getattr", "builtins.__import__"),
)
UNREADABLE = (  # what damaged and hostile files raise
    *(pickle.UnpicklingError, SafetensorError, zipfile.BadZipFile, struct.error, EOFError, OSError, RuntimeError),
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, MemoryError),
)


class StandIn:
    """Stands in for a class or function that a pickle names: takes any arguments, keeps its state, and does nothing."""

    def __new__(cls, *args: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class DictStandIn:
    """The same for a kind of dict, which the pickle then fills."""

    def __new__(cls, *args: Any) -> dict:
        return {}


class TensorFile(AbstractContextManager):
    """Tensors of a `.safetensors` or `.ckpt` file by name; a context manager.

    Tensors nested under `state_dict` or `string_to_param` are found there; those of a list are named by their places.

    Attributes:
        path: the file.
        format: "safetensors", "pickle", or "legacy pickle" (torch before 1.6).
        shapes, dtypes: of every tensor, by name.
        metadata: of a safetensors file.
        content: what a pickle holds, a dict or a list's items by place; empty for a safetensors file.

    Raises:
        ValueError: no such file, or not one that can be read safely; one line that says why.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        self.metadata: dict[str, str] = {}
        self.content: Mapping[Any, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        try:
            self.format = _format(self.path)
            if self.format == "safetensors":
                self._open_safetensors()
            else:
                self._open_pickle()
        except UNREADABLE as error:
            raise UserError(f"{path}: not a file of tensors that can be read safely ({_reason(error)})") from error

    def _open_safetensors(self) -> None:
        with safe_open(self.path, framework="pt") as file:
            self.metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            self.shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
            self.dtypes = {name: DTYPES[piece.get_dtype()] for name, piece in slices.items()}

    def _open_pickle(self) -> None:
        content = _unpickle(self.path, legacy=self.format == "legacy pickle")
        if isinstance(content, list):
            content = {str(place): value for place, value in enumerate(content)}
        if not isinstance(content, Mapping):
            raise UserError(f"holds no state dict but a {type(content).__name__}")
        self.content = content
        for _ in range(NESTED):
            inner = map(_mapping, (content.get(level) for level in LEVELS))
            content = next((found for found in inner if found is not None), content)
        self._tensors = tensors_of(content)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU, as stored."""
        if self.format != "safetensors":
            return self._tensors[name]
        with safe_open(self.path, framework="pt") as file:  # anew: pages that were read would stay in memory
            return file.get_tensor(name)

    def __exit__(self, *error: object) -> None:
        """Lets go of the file: nothing can be read afterwards."""
        self._tensors, self.content = {}, {}


def tensors_of(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a mapping that have a name and numbers, without gradients."""
    return {
        name: value.detach()
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
        if value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    }


def _mapping(value: Any) -> Mapping | None:
    """A mapping as it is, and what is in the stand-in for torch's ParameterDict; None of anything else."""
    if isinstance(value, StandIn) and isinstance(state := getattr(value, "state", None), Mapping):
        value = state.get("_parameters")
    return value if isinstance(value, Mapping) else None


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; the same tensors and metadata make the same bytes, which the library's own order does not."""
    return b"".join(pieces(tensors, metadata))


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """`serialise` piece by piece, so that a file of several GB needs no memory of its own."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # each is aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _format(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return "pickle"
    if head.startswith(LEGACY):
        return "legacy pickle"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= HEADER:
        return "safetensors"
    found = next((says for start, says in OTHERS.items() if head.lstrip().startswith(start)), None)
    raise UserError(found or "neither a safetensors file nor one of torch.save's; is it whole?")


def _unpickle(path: Path, legacy: bool) -> Any:
    """What torch.save wrote; tensors of zip archives stay in the file until they are read."""
    if path.suffix == ".safetensors":  # torch.load goes by the ending
        raise UserError("a pickle, and no safetensors file: let its name end in .ckpt")
    if not legacy:
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise UserError("its records are compressed, as torch.save never does")
    names = _named(path) if legacy else get_unsafe_globals_in_checkpoint(path)
    for name in names:
        if name.startswith(FORBIDDEN):
            raise UserError(f"its pickle names {name[:100]!a}, which is no tensor data; nothing of it ran")
    stand_ins = [(DictStandIn if name.endswith(DICTS) else StandIn, name) for name in names]
    with safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=not legacy)


def _named(path: Path) -> set[str]:
    """The classes and functions that a legacy file names; its fourth pickle is the content."""
    with path.open("rb") as file:
        codes = [code for _ in range(4) for code in pickletools.genops(file)]
    names = {argument.replace(" ", ".") for opcode, argument, _ in codes if opcode.name == "GLOBAL"}
    python3 = {"__builtin__.long": "builtins.int", "__builtin__.unicode": "builtins.str"}
    return {
        python3.get(name, name.replace("__builtin__.", "builtins.").replace("copy_reg.", "copyreg.")) for name in names
    }


def _reason(error: Exception) -> str:
    """One line of what torch or safetensors say, without the advice to trust the file."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    if "Unsupported operand" in text:
        return "damaged, or of a pickle protocol that torch.save does not use by itself: save it anew"
    return text.strip().partition("\n")[0][:300] or type(error).__name__
