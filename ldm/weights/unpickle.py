"""What a `.ckpt` file says, without doing what it says.

A pickle is a program: it names functions of any module and calls them. Here it is read by a machine that never imports
a name and never calls, fills or changes anything but the values of this file:

1. A name in a pickle becomes a `Name`, an object of this file. Nothing is looked up in the module that it claims.
2. `NAMES` and `STORAGES` give a few names a meaning: the functions by which torch rebuilds tensors become `_tensor` and
   its like, which only note where a tensor lies (`StoredTensor`); `OrderedDict` makes a dict; dtypes are themselves.
3. Names that hold data in checkpoints of old trainers become stand-ins (`Inert`): they can be called and filled, forget
   everything, and run nothing. These are numpy's few functions for arrays and scalars (`INERT`), and what looks like
   a class (a capital letter) of the packages in `CLASSES`: callbacks of Lightning, configs of OmegaConf, namespaces, …
4. Every other name refuses the file, whether it would have been called or not: `os.system`, `builtins.eval`, `getattr`,
   `functools.partial`, `torch.load`, a class of `__main__`, … So do copyreg's extension codes, out-of-band buffers,
   a call of anything but a `Name`, attributes set on anything but a stand-in, and persistent ids that are no storages.

Rule 1 is what makes it safe; rule 4 tells the user that the file is no plain checkpoint.

A pickle of a few bytes can also ask for much: a call copies a list of a million, and again, and again; numbers that are
chosen for it fill one place of a dict; keys of tuples within tuples are deeper than the stack. So there are limits to
its length (`LENGTH`), to what its calls are given (`WORK`), and to what a key is (`_key`).
"""

import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

STORAGES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool},
    **{"ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64, "UntypedStorage": torch.uint8},
}
# packages (or modules) whose classes become stand-ins
CLASSES = (
    *("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "omegaconf"),
    *("torch.nn", "torch.optim", "numpy.dtypes", "typing", "collections", "argparse", "pathlib", "datetime", "decimal"),
)
NUMPY = ("bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128 "
         "str_ bytes_ dtype ndarray")  # fmt: skip
INERT = {
    *(("numpy", name) for name in NUMPY.split()),
    *(("numpy." + module, name) for module in ("core.multiarray", "_core.multiarray") for name in
      ("scalar", "_reconstruct")),
    *(("numpy." + module, "_frombuffer") for module in ("core.numeric", "_core.numeric")),
    *(("builtins", name) for name in ("object", "set", "frozenset", "complex", "bytearray", "slice", "range")),
    *(("builtins", name) for name in ("dict", "list", "tuple", "int", "float", "str", "bool", "bytes")),
    *(("builtins", name) for name in ("long", "unicode", "xrange")),  # protocol 2 has Python 2's names for types
    *(("_codecs", "encode"), ("copyreg", "_reconstructor"), ("collections", "deque")),
    *(("datetime", name) for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(("torch", "device"), ("torch.serialization", "_get_layout"), ("torch", "Tensor")),
}  # fmt: skip
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
MALFORMED = (
    *(pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError, AssertionError),
    *(ArithmeticError, MemoryError, RecursionError, struct.error),
)


LENGTH = 2**21  # bytes of a pickle; those of published checkpoints have 0.3 million
WORK = 2**22  # items of all lists, tuples and dicts that are handed to functions
AXES = 16  # of a tensor
KEY = 2**48  # integers below it find a place in a dict without many collisions


class Refused(ValueError):
    """The pickle asks for more than data; the message is the reason, in one line."""


class Malformed(Refused):
    """It is no pickle, or not a whole one."""


@dataclass(frozen=True)
class Storage:
    """Numbers in the file: `count` elements of a dtype, `start` elements behind the beginning of the record `key`."""

    key: str
    dtype: torch.dtype
    count: int
    start: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its storage; offset and stride count elements of `dtype`."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Number of elements from the tensor's first to its last, that one included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


class Inert:
    """Stands in for an object of no interest: takes whatever a pickle puts into it, and keeps nothing."""

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...

    def update(self, items: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class Name:
    """Stands in for a class or function: `make` is what a call of it returns, and a function of this file."""

    def __init__(self, make: Callable[..., Any] = lambda *_: Inert(), dtype: torch.dtype | None = None) -> None:
        self.make = make
        self.dtype = dtype  # of a storage's class


def unpickle(file: BinaryIO) -> tuple[Any, dict[str, torch.dtype]]:
    """The next pickle of a file, of protocol 0 to 5.

    Returns:
        Its value, made of plain values, dicts, `StoredTensor`s and stand-ins; the dtypes of its storages by their keys.

    Raises:
        Refused: it asks for more than data or for too much, or is malformed.
    """
    start = file.tell()
    content = io.BytesIO(file.read(LENGTH))
    machine = _Machine(content, encoding="latin1")
    machine.storages, machine.work = {}, 0
    try:
        value = machine.load()
        file.seek(start + content.tell())
        return value, machine.storages
    except Refused:
        raise
    except MALFORMED as error:
        raise Malformed(f"not a whole pickle: {type(error).__name__}") from error


def _tensor(storage: Storage, offset: int, shape: tuple, stride: tuple, grad: bool = False, hooks: Any = None,
            metadata: Any = None, dtype: torch.dtype | None = None) -> StoredTensor:  # fmt: skip
    sizes = (offset, *shape, *stride)
    if type(storage) is not Storage or not all(type(size) is int and 0 <= size < 2**48 for size in sizes):
        raise Refused("a tensor's storage, offset, shape or stride is none")
    if len(shape) > AXES:
        raise Refused(f"a tensor has {len(shape)} axes")
    if metadata:
        raise Refused("a tensor is a conjugated or negated view")
    tensor = StoredTensor(storage, dtype or storage.dtype, offset, tuple(shape), tuple(stride))
    if (offset + tensor.extent) * tensor.dtype.itemsize > storage.count * storage.dtype.itemsize:
        raise Refused("a tensor reaches beyond its storage")
    return tensor


def _tensor_v3(storage: Storage, offset: int, shape: tuple, stride: tuple, grad: bool, hooks: Any, dtype: torch.dtype,
               metadata: Any = None) -> StoredTensor:  # fmt: skip
    if type(dtype) is not torch.dtype:
        raise Refused("a tensor's dtype is none")
    return _tensor(storage, offset, shape, stride, grad, hooks, metadata, dtype)


def _from_type(make: Name, kind: Any, args: tuple, state: Any) -> Any:
    if type(make) is not Name or make.make not in (_tensor, _tensor_v3, _data) or type(args) is not tuple:
        raise Refused("a tensor is to be made by something that makes none")
    return make.make(*args)


def _data(data: Any, *_: Any) -> Any:
    return data


NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): Name(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Name(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Name(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Name(_data),
    ("torch._utils", "_rebuild_parameter_with_state"): Name(_data),
    ("torch._tensor", "_rebuild_from_type_v2"): Name(_from_type),
    ("torch", "Size"): Name(lambda sizes=(): tuple(sizes)),
    ("collections", "OrderedDict"): Name(lambda *pairs: dict(*pairs)),
    ("collections", "defaultdict"): Name(lambda *_: {}),
    ("collections", "Counter"): Name(lambda *pairs: dict(*pairs)),
    **{("torch", str(dtype).split(".")[1]): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    **{(module, name): Name(dtype=dtype) for name, dtype in STORAGES.items() for module in
       ("torch", "torch.cuda", "torch.storage")},
}  # fmt: skip


class _Machine(pickle._Unpickler):
    """The standard library's machine in Python, without its imports and calls."""

    storages: dict[str, torch.dtype]
    work: int

    def find_class(self, module: str, name: str) -> Any:
        module = PYTHON_2.get(module, module)
        if (module, name) in NAMES:
            return NAMES[module, name]
        within = any(f"{module}.".startswith(f"{package}.") for package in CLASSES)
        last = name.rpartition(".")[2]
        if (module, name) in INERT or (within and last.isidentifier() and last.lstrip("_")[:1].isupper()):
            return Name()
        raise Refused(f"its pickle names {_printable(f'{module}.{name}')}, which is no tensor data; nothing of it ran")

    def persistent_load(self, pid: Any) -> Storage:
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            raise Refused("a persistent id is no storage")
        kind, key, _, count = pid[1:5]
        if type(kind) is not Name or kind.dtype is None or type(key) is not str or type(count) is not int or count < 0:
            raise Refused("a persistent id is no storage")
        self.storages[key] = kind.dtype
        if len(pid) == 5 or pid[5] is None:
            return Storage(key, kind.dtype, count)
        _, start, length = pid[5]  # a view of another storage, in files of old
        if type(start) is not int or type(length) is not int or not 0 <= start <= start + length <= count:
            raise Refused("a storage reaches beyond the one it is a view of")
        return Storage(key, kind.dtype, length, start)

    def load_persid(self) -> None:
        raise Refused("a persistent id is no storage")

    def load_extension(self) -> None:
        raise Refused("its pickle uses copyreg's extension codes or out-of-band buffers; nothing of it ran")

    def call(self, function: Any, args: Any) -> Any:
        if type(function) is not Name or type(args) is not tuple:
            raise Refused("its pickle calls something that is no function; nothing of it ran")
        self.work += 1 + len(args) + sum(len(arg) for arg in args if isinstance(arg, list | tuple | dict))
        if self.work > WORK:
            raise Refused("its pickle hands the same lists to functions again and again")
        for arg in args:
            for pair in arg if isinstance(arg, list | tuple | dict) else ():
                _key(pair[0] if isinstance(pair, list | tuple) and pair else None)
        return function.make(*args)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self.load_reduce()

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.append(self.call(self.find_class(module, name), tuple(self.pop_mark())))

    def load_obj(self) -> None:
        function, *args = self.pop_mark()
        self.append(self.call(function, tuple(args)))

    def load_build(self) -> None:
        self.stack.pop()  # the state: attributes of what is below, all of no interest
        if not isinstance(self.stack[-1], Inert | dict | StoredTensor):
            kind = "class or function" if type(self.stack[-1]) is Name else type(self.stack[-1]).__name__
            raise Refused(f"its pickle sets attributes of a {kind}; nothing of it ran")

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    def load_additems(self) -> None:
        items = self.pop_mark()
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(map(_key, items))

    def load_frozenset(self) -> None:
        self.append(frozenset(map(_key, self.pop_mark())))

    def load_bytearray8(self) -> None:
        length = int.from_bytes(self.read(8), "little")
        if length > LENGTH:
            raise Refused(f"bytes of a pickle that reach beyond it: {length:,}")
        self.append(self.read(length))

    dispatch = pickle._Unpickler.dispatch | {
        pickle.PERSID[0]: load_persid,
        **dict.fromkeys((pickle.EXT1[0], pickle.EXT2[0], pickle.EXT4[0]), load_extension),
        **dict.fromkeys((pickle.NEXT_BUFFER[0], pickle.READONLY_BUFFER[0]), load_extension),
        **dict.fromkeys((pickle.REDUCE[0], pickle.NEWOBJ[0]), load_reduce),
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.INST[0]: load_inst,
        pickle.OBJ[0]: load_obj,
        pickle.BUILD[0]: load_build,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }


def _key(key: Any) -> Any:
    """The same, when it finds its place in a dict at once: no tuples within tuples, no numbers chosen to collide."""
    parts = key if type(key) is tuple and len(key) <= AXES else (key,)
    for part in parts:
        if type(part) in (int, float) and not abs(part) < KEY or not isinstance(part, KEYS):
            raise Refused(f"a key of a dict is a {type(part).__name__} that no checkpoint has")
    return key


KEYS = (str, bytes, int, float, Name, Inert, StoredTensor, Storage, torch.dtype, type(None))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:100]
