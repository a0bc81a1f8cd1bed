"""Files of tensors, by their content and not by their ending: read one tensor at a time, and nothing of them is run."""

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.weights.unpickle import LENGTH, Malformed, Refused, StoredTensor, unpickle

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64},
    **{"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64},
    **{"U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64},
}
MAPPED = 2**25  # bytes read from a memory-mapped file before it is mapped anew, which frees its pages
LEGACY = 0x1950A86A20F9469CFC6C  # what torch.save wrote first before it wrote zip archives
HEADER = 2**24  # bytes of a safetensors file's header; safetensors takes 100 MB, which takes a minute to read
REPEATED = 2**22  # numbers of a tensor that repeats some, at most
LARGEST = 2**60  # bytes of any file
RECORDS = 2**16  # of an archive, at most
UNREADABLE = (
    *(ValueError, SafetensorError, zipfile.BadZipFile, struct.error, OSError, NotImplementedError, OverflowError),
    *(EOFError, LookupError),
)
NESTED = 8  # `state_dict`s within each other


class TensorFile:
    """Tensors of a `.safetensors` or `.ckpt` file by name; a context manager.

    A `.ckpt` file is a pickle, which `ldm.weights.unpickle` reads. Tensors nested under `state_dict` are found there.

    Attributes:
        path: the file.
        format: "safetensors", "pickle", or "legacy pickle" (torch before 1.6).
        shapes, dtypes: of every tensor, by name.
        metadata: of a safetensors file.
        top: a pickle's outermost keys.

    Raises:
        ValueError: no such file, or not one that can be read safely; one line that says why.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: no such file")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.metadata: dict[str, str] = {}
        self.top: tuple[str, ...] = ()
        self._stack = ExitStack()
        try:
            with open(self.path, "rb") as file:
                self.format = _format(file)
            source = _Mapped(self.path) if self.format == "safetensors" else _Pickled(self.path, self.format)
            self._stack.callback(source.close)
            source.describe(self)
        except UNREADABLE as error:
            self._stack.close()
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path}: not a checkpoint that can be read safely ({reason})") from error
        self._source = source

    @property
    def content(self) -> Any:
        """What a pickle holds, with a `StoredTensor` for each tensor; None of a safetensors file."""
        return self._source.content if isinstance(self._source, _Pickled) else None

    def include(self, part: Mapping) -> None:
        """Lists the tensors of a mapping that lies somewhere in `content`.

        Raises:
            ValueError: a tensor that is cut off.
        """
        try:
            self._source.include(part, self)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def read(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU, as stored."""
        return self._source.read(name)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing can be read afterwards."""
        self._stack.close()


class _Mapped:
    """A safetensors file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = safe_open(path, framework="pt")
        self.used = 0

    def describe(self, target: TensorFile) -> None:
        target.metadata = self.file.metadata() or {}
        for name in self.file.keys():  # noqa: SIM118
            piece = self.file.get_slice(name)
            if piece.get_dtype() not in DTYPES:
                raise Refused(f"{name[:100]} has the unknown dtype {piece.get_dtype()}")
            target.shapes[name], target.dtypes[name] = tuple(piece.get_shape()), DTYPES[piece.get_dtype()]

    def read(self, name: str) -> Tensor:
        if self.used > MAPPED:
            self.file, self.used = safe_open(self.path, framework="pt"), 0
        tensor = self.file.get_tensor(name)
        self.used += tensor.nbytes
        return tensor

    def close(self) -> None:
        self.file = None


class _Pickled:
    """A file of torch.save: the pickle says where tensors lie, and they are read from there."""

    def __init__(self, path: Path, format: str) -> None:
        with ExitStack() as stack:
            self.file = stack.enter_context(open(path, "rb"))
            self.content, self.records = _legacy(self.file) if format == "legacy pickle" else _archive(self.file)
            self.close = stack.pop_all().close
        self.size = path.stat().st_size
        self.tensors: dict[str, StoredTensor] = {}

    def describe(self, target: TensorFile) -> None:
        content: Any = self.content
        if isinstance(content, Mapping):
            target.top = tuple(key for key in content if isinstance(key, str))
        for _ in range(NESTED):
            if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
                content = content["state_dict"]
        if not isinstance(content, Mapping):
            raise Refused(f"holds no state dict but a {type(content).__name__}")
        self.include(content, target)

    def include(self, part: Mapping, target: TensorFile) -> None:
        for name, value in part.items():
            if isinstance(name, str) and isinstance(value, StoredTensor):
                if value.dtype not in (*DTYPES.values(), torch.complex128):
                    raise Refused(f"{name[:100]} has the unknown dtype {value.dtype}")
                self.tensors[name] = value
                target.shapes[name], target.dtypes[name] = value.shape, value.dtype
                start, count = self.place(value)
                if start + count > self.size:
                    raise Refused(f"cut off: {name[:100]} ends at byte {start + count} of {self.size}")

    def place(self, tensor: StoredTensor) -> tuple[int, int]:
        """The tensor's first byte in the file, and its number of bytes."""
        storage, width = tensor.storage, tensor.dtype.itemsize
        if storage.key not in self.records:
            raise Refused(f"there is no record {storage.key[:40]!r} for a tensor")
        start, length = self.records[storage.key]
        within = storage.start * storage.dtype.itemsize + tensor.offset * width
        if within + tensor.extent * width > length:
            raise Refused(f"the record {storage.key[:40]!r} is too short for a tensor")
        return start + within, tensor.extent * width

    def read(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if math.prod(tensor.shape) > max(tensor.extent, REPEATED):
            raise ValueError(f"{self.file.name}: {name[:100]} repeats its numbers, and is larger than the file says")
        start, count = self.place(tensor)
        buffer = torch.empty(count, dtype=torch.uint8)
        self.file.seek(start)
        if self.file.readinto(buffer.numpy()) != count:
            raise ValueError(f"{self.file.name}: {name} cannot be read whole")
        if not count:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        return buffer.view(tensor.dtype).as_strided(tensor.shape, tensor.stride)


def _format(file: BinaryIO) -> str:
    head = file.read(512)
    if head.startswith(b"PK"):
        return "pickle"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= HEADER:
        return "safetensors"
    if head.startswith(b"version https://git-lfs"):
        raise Refused("a Git LFS pointer: get the file itself by `git lfs pull`")
    if head[257:262] == b"ustar":
        raise Refused("a tar archive, as torch wrote before 0.4: save it anew")
    return "legacy pickle"


def _archive(file: BinaryIO) -> tuple[Any, dict[str, tuple[int, int]]]:
    """What a zip archive of torch.save pickles, and its records: key -> (first byte, number of bytes)."""
    end = file.seek(0, io.SEEK_END)
    archive = zipfile.ZipFile(file)
    if len(archive.filelist) > RECORDS:
        raise Refused(f"a zip archive of more than {RECORDS:,} records")
    names = archive.namelist()
    folders = {name.split("/")[0] for name in names}
    inner = [name.partition("/")[2] for name in names]
    if any(name == "constants.pkl" or name.startswith("code/") for name in inner):
        raise Refused("a TorchScript archive, which is a program: nothing of it ran")
    if inner.count("data.pkl") != 1 or len(folders) != 1:
        raise Refused("a zip archive that is none of torch.save's")
    if len(set(names)) != len(names):
        raise Refused("a zip archive with two records of the same name")
    (folder,) = folders
    records = {}
    for info, name in zip(archive.infolist(), inner, strict=True):
        if name.startswith("data/") or name in ("data.pkl", "byteorder"):
            if info.compress_type != zipfile.ZIP_STORED:
                raise Refused("its records are compressed: save it anew by torch.save")
            file.seek(info.header_offset)
            header = file.read(30)  # "PK\3\4" … lengths of the name and of the extra field, which come next
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise Refused("a damaged zip archive")
            start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
            if start + info.file_size > end:
                raise Refused(f"cut off: a record ends at byte {start + info.file_size} of {end}")
            records[name.removeprefix("data/")] = (start, info.file_size)
    if records.get("data.pkl", (0, 0))[1] > LENGTH:
        raise Refused(f"its pickle has more than {LENGTH:,} bytes, which no checkpoint's has")
    pickled, byteorder = (_bytes(file, *records.pop(name, (0, 0))[:2]) for name in ("data.pkl", "byteorder"))
    if byteorder == b"big":
        raise Refused("written on a big-endian machine: save it anew on another")
    return unpickle(io.BytesIO(pickled))[0], records


def _bytes(file: BinaryIO, start: int, count: int) -> bytes:
    if start + count > LARGEST:
        raise Refused("cut off, or damaged: a record lies beyond the end of any file")
    file.seek(start)
    return file.read(min(count, LENGTH))


def _legacy(file: BinaryIO) -> tuple[Any, dict[str, tuple[int, int]]]:
    """As `_archive`, for what torch.save wrote before 1.6: five pickles, then the storages one after the other."""
    try:
        magic = unpickle(file)[0]
    except Malformed:
        magic = None
    if magic != LEGACY:
        raise Refused("neither a safetensors file nor one of torch.save's; is it whole?")
    version, system = (unpickle(file)[0] for _ in range(2))
    if version != 1001 or not isinstance(system, dict) or not system.get("little_endian", True):
        raise Refused("written by another version of torch, or on a big-endian machine: save it anew")
    content, dtypes = unpickle(file)
    keys = unpickle(file)[0]
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in dtypes for key in keys):
        raise Refused("its list of storages is damaged")
    records, start = {}, file.tell()
    for key in keys:  # each is its number of elements, in 8 bytes, and then the elements
        count = int.from_bytes(_bytes(file, start, 8), "little") * dtypes[key].itemsize
        records[key] = (start + 8, count)
        start += 8 + count
    return content, records
