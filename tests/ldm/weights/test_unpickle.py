"""What `.ckpt` files may and may not do. A canary is a file that a hostile pickle makes if it gets to run."""

import argparse
import copyreg
import functools
import io
import os
import pickle
import re
import subprocess
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.parsing import AttributeDict
from safetensors.torch import save_file
from torch import Tensor

from ldm.weights.files import LEGACY, TensorFile
from ldm.weights.unpickle import LENGTH, NAMES, Inert, Refused, StoredTensor, unpickle


class Call:
    """Pickles as a call of a function, with a state if there is one."""

    def __init__(self, function: Callable, *args: object, state: object = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple:
        return self.reduced


def touch(path: Path) -> str:
    return f"open({str(path)!r}, 'w').close()"


HOSTILE: dict[str, Callable[[Path], object]] = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "os.mkdir in a state dict": lambda canary: {"state_dict": {"weight": Call(os.mkdir, str(canary))}},
    "os.mkdir as a key": lambda canary: {(Call(os.mkdir, str(canary)),): 1},
    "eval": lambda canary: Call(eval, touch(canary)),
    "exec in a list": lambda canary: [[Call(exec, touch(canary))]],
    "in the arguments of what is harmless": lambda canary: Call(list, (Call(os.mkdir, str(canary)),)),
    "in the state of what is harmless": lambda canary: Call(OrderedDict, state={"x": Call(os.mkdir, str(canary))}),
    "subprocess": lambda canary: Call(subprocess.check_call, ["touch", str(canary)]),
    "numpy objects": lambda canary: np.array([Call(os.mkdir, str(canary))], dtype=object),
    "partial": lambda canary: Call(functools.partial(os.mkdir, str(canary))),
    "getattr": lambda canary: Call(Call(getattr, Call(__import__, "os"), "mkdir"), str(canary)),
    "a class": lambda canary: Call(type, "X", (), {"x": Call(os.mkdir, str(canary))}),
    "torch.load": lambda canary: Call(torch.load, Call(io.BytesIO, bomb(canary))),
    "a storage's bytes": lambda canary: Call(torch.storage._load_from_bytes, bomb(canary)),
}


def bomb(canary: Path) -> bytes:
    file = io.BytesIO()
    torch.save(Call(os.mkdir, str(canary)), file)
    return file.getvalue()


def archive(path: Path, data: bytes, **records: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {"data.pkl": data, "version": b"3\n", **records}.items():
            file.writestr(f"archive/{name}", content)


def legacy(path: Path, data: bytes) -> None:
    head = [pickle.dumps(part, protocol=2) for part in (LEGACY, 1001, {"little_endian": True})]
    path.write_bytes(b"".join([*head, data, pickle.dumps([], protocol=2)]))


def plain(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def reason(path: Path) -> str:
    """Why a file is refused: one line that begins with its name."""
    with pytest.raises(ValueError) as error:
        TensorFile(path)
    text = str(error.value)
    assert text.startswith(f"{path}: not a checkpoint that can be read safely (") and "\n" not in text
    return text


@pytest.mark.parametrize("write", [archive, legacy, plain])
@pytest.mark.parametrize("name", HOSTILE)
def test_no_pickle_runs_anything(tmp_path, write, name):
    canary, path = tmp_path / "canary", tmp_path / "evil.ckpt"
    for protocol in range(6):
        try:
            data = pickle.dumps(HOSTILE[name](canary), protocol=protocol)
        except pickle.PicklingError:  # protocol 0 has only text for a name
            continue
        write(path, data)
        assert "nothing of it ran" in reason(path)
        assert not canary.exists()
    if write is plain and name not in ("torch.load", "a storage's bytes", "partial", "getattr", "a class"):
        pickle.loads(data)  # the payload is live
        assert canary.exists()


def emit(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def name(module: str, qualname: str) -> bytes:
    texts = (pickle.SHORT_BINUNICODE + bytes([len(t)]) + t.encode() for t in (module, qualname))
    return b"".join(texts) + pickle.STACK_GLOBAL


INERT_INSTANCE = name("torch.nn", "Module") + b")" + pickle.NEWOBJ
HANDMADE = {
    "through a package": (emit(name("torch", "os.mkdir")), "torch.os.mkdir"),
    "through a package of classes": (emit(name("pathlib", "os.mkdir")), "pathlib.os.mkdir"),
    "numpy's own": (emit(name("numpy.testing._private.utils", "runstring")), "runstring"),
    "a function of Lightning": (emit(name("pytorch_lightning.utilities.cloud_io", "load")), "cloud_io.load"),
    "control characters": (emit(name("os\n\x1b", "system")), "names os??.system"),
    "an instruction of protocol 0": (b"(S'x'\nios\nsystem\n.", "names os.system"),
    "an object of protocol 1": (b"(cos\nsystem\nS'x'\no.", "names os.system"),
    "Python 2": (b"c__builtin__\neval\n(S'1'\ntR.", "names builtins.eval"),
    "a class is changed": (emit(name("torch.nn", "Module"), b"N}", pickle.TUPLE2, b"b"), "sets attributes of a class"),
    "a list is built": (emit(b"]}b"), "sets attributes of a list"),
    "a string is called": (emit(pickle.SHORT_BINUNICODE, b"\x01x", b")R"), "calls something that is no function"),
    "a stand-in is called": (emit(INERT_INSTANCE, b")R"), "calls something that is no function"),
    "an id in text": (b"Pstorage\n.", "persistent id is no storage"),
    "an id of a module": (emit(b"(", pickle.SHORT_BINUNICODE, b"\x06module", b"NNNtQ"), "persistent id is no storage"),
    "an id with a path": (
        emit(b"(\x8c\x07storage", name("torch", "FloatStorage"), b"N\x8c\x03cpuK\x01tQ"),
        "persistent id is no storage",
    ),
    "a buffer": (emit(pickle.NEXT_BUFFER), "extension codes or out-of-band buffers"),
    "a tensor out of nothing": (emit(name("torch._utils", "_rebuild_tensor_v2"), b"(NK\x00))\x89NtR"), "storage"),
}


@pytest.mark.parametrize("case", HANDMADE)
@pytest.mark.parametrize("write", [archive, legacy])
def test_handmade_pickles_are_refused_for_their_reason(tmp_path, write, case):
    data, expected = HANDMADE[case]
    write(tmp_path / "evil.ckpt", data)
    assert expected in reason(tmp_path / "evil.ckpt")


def test_extension_codes_are_refused_even_when_python_knows_them(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    monkeypatch.setitem(copyreg._inverted_registry, 7, ("os", "mkdir"))
    monkeypatch.setitem(copyreg._extension_cache, 7, os.mkdir)
    text = str(canary).encode()
    data = emit(pickle.EXT1, b"\x07", pickle.SHORT_BINUNICODE, bytes([len(text)]), text, pickle.TUPLE1, b"R")
    archive(tmp_path / "evil.ckpt", data)
    assert "extension codes" in reason(tmp_path / "evil.ckpt") and not canary.exists()
    pickle.loads(data)
    assert canary.exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_archives_are_refused(tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1)), path)
    assert "TorchScript" in reason(path)
    archive(path, pickle.dumps({}), **{"constants.pkl": b""})
    assert "TorchScript" in reason(path)


def test_archives_of_something_else_are_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "<xml/>")
    assert "none of torch.save's" in reason(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps({"a": "a" * 1000}))
    assert "compressed" in reason(path)
    archive(path, pickle.dumps({}), byteorder=b"big")
    assert "big-endian" in reason(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "Git LFS pointer" in reason(path)
    path.write_bytes(b"\0" * 257 + b"ustar" + b"\0" * 250)
    assert "tar archive" in reason(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_are_cut_off_are_refused(tmp_path, zipped):
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.randn(100), "b": torch.randn(100)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for share in (0.01, 0.3, 0.6, 0.9, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        reason(path)


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 5)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
    return {
        **{str(dtype): (base * 3).to(dtype) for dtype in dtypes},
        **{"base": base, "transposed": base.T, "slice": base[1::2, 2:], "expanded": base[:1].expand(4, 5)},
        **{"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "complex": torch.randn(3, dtype=torch.complex64)},
        **{"parameter": torch.nn.Parameter(torch.randn(2)), "uint16": torch.arange(5).to(torch.uint16)},
    }


@pytest.mark.parametrize("zipped, protocol", [(True, 2), (True, 3), (True, 4), (True, 5), (False, 2), (False, 4)])
def test_tensors_are_those_that_were_saved(tmp_path, zipped, protocol):
    saved = tensors()
    torch.save(saved, tmp_path / "a.ckpt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with TensorFile(tmp_path / "a.ckpt") as file:
        assert file.format == ("pickle" if zipped else "legacy pickle")
        assert file.shapes == {name: tuple(tensor.shape) for name, tensor in saved.items()}
        for name, tensor in saved.items():
            assert file.dtypes[name] == tensor.dtype == file.read(name).dtype
            assert torch.equal(file.read(name), tensor.detach())


@pytest.mark.parametrize("zipped", [True, False])
def test_training_states_of_old_load_with_all_that_they_carry(tmp_path, zipped):
    """Lightning 1.x pickles callbacks' states under their classes, hyperparameters as they are, and the optimiser."""
    weights = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(weights.parameters())
    weights(torch.ones(3)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": weights.state_dict(),  # an OrderedDict with an attribute, `_metadata`
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(1.0), "dirpath": Path("/x")}},
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": AttributeDict(config=OmegaConf.create({"a": [1, {"b": None}]}), n=np.float64(3)),
        "arrays": (np.arange(3), np.array(["a", None], dtype=object), np.dtype("float32"), np.bool_(True)),
        "others": [argparse.Namespace(x=1), defaultdict(list, a=[1]), {1, 2}, 1j, b"bytes", bytearray(b"x"), slice(3)],
        "dtype": torch.float16,
        "device": torch.device("cpu"),
    }
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    with TensorFile(tmp_path / "a.ckpt") as file:
        assert file.top == tuple(content)
        assert set(file.shapes) == {"weight", "bias"}
        assert torch.equal(file.read("weight"), weights.weight)


def test_endings_do_not_matter(tmp_path):
    saved = {"a": torch.randn(3)}
    save_file(saved, tmp_path / "a.ckpt", metadata={"x": "y"})
    torch.save(saved, tmp_path / "a.safetensors")
    for name, format in (("a.ckpt", "safetensors"), ("a.safetensors", "pickle")):
        with TensorFile(tmp_path / name) as file:
            assert file.format == format and torch.equal(file.read("a"), saved["a"])
            assert file.metadata == ({"x": "y"} if format == "safetensors" else {})


def test_what_is_no_state_dict_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "a.ckpt")
    assert "holds no state dict but a list" in reason(tmp_path / "a.ckpt")
    content: dict = {}
    content["state_dict"] = content
    archive(tmp_path / "a.ckpt", pickle.dumps(content))
    with TensorFile(tmp_path / "a.ckpt") as file:
        assert file.shapes == {}


def storage_id(count: int, key: bytes = b"0") -> bytes:
    text = b"\x8c" + bytes([len(key)]) + key
    return emit_part(b"(\x8c\x07storage", name("torch", "FloatStorage"), text, b"\x8c\x03cpuK", bytes([count]), b"tQ")


def emit_part(*parts: bytes) -> bytes:
    return b"".join(parts)


def rebuilt(storage: bytes, offset: int, size: int, stride: int) -> bytes:
    shape = [b"K", bytes([offset]), b"K", bytes([size]), pickle.TUPLE1, b"K", bytes([stride]), pickle.TUPLE1]
    tensor = [name("torch._utils", "_rebuild_tensor_v2"), b"(", storage, *shape, pickle.NEWFALSE, b"}tR"]
    return emit(b"}\x8c\x01a", *tensor, b"s")


@pytest.mark.parametrize(
    "data, expected",
    [
        (rebuilt(storage_id(4), 1, 4, 1), "reaches beyond its storage"),
        (rebuilt(storage_id(4), 0, 2, 5), "reaches beyond its storage"),
        (rebuilt(storage_id(5), 0, 5, 1), "record '0' is too short"),
        (rebuilt(storage_id(4, b"../1"), 0, 4, 1), "no record '../1'"),
    ],
)
def test_tensors_stay_within_their_records(tmp_path, data, expected):
    archive(tmp_path / "a.ckpt", data, **{"data/0": torch.arange(4.0).numpy().tobytes()})
    assert expected in reason(tmp_path / "a.ckpt")
    archive(tmp_path / "a.ckpt", rebuilt(storage_id(4), 1, 2, 2), **{"data/0": torch.arange(4.0).numpy().tobytes()})
    with TensorFile(tmp_path / "a.ckpt") as file:
        assert file.read("a").tolist() == [1, 3]


def test_no_name_becomes_what_it_says():
    """Whatever a pickle names, what comes of it is plain data or an object of this package."""
    for module, qualname in [*NAMES, ("pytorch_lightning.callbacks", "ModelCheckpoint"), ("numpy", "dtype")]:
        value, _ = unpickle(io.BytesIO(emit(name(module, qualname))))
        assert isinstance(value, torch.dtype) or type(value).__module__ == "ldm.weights.unpickle"
    value, _ = unpickle(io.BytesIO(emit(INERT_INSTANCE)))
    assert type(value) is Inert
    with pytest.raises(Refused, match="not a whole pickle"):
        unpickle(io.BytesIO(b"\x80\x04]"))


def test_the_machine_reads_plain_values_of_every_protocol():
    values = {"a": [1, -2, 2**70, 1.5, None, True, "ü", (), (1,), (1, 2, 3, 4)], 3: {"b": {}}}
    for protocol in range(6):
        assert unpickle(io.BytesIO(pickle.dumps(values, protocol=protocol)))[0] == values
    empty = StoredTensor(None, torch.float32, 0, (2, 0), (1, 1))
    assert empty.extent == 0


FLOATS = b"(\x8c\x07storage" + name("torch", "FloatStorage") + b"\x8c\x010\x8c\x03cpuK\x04tQ"  # four, in record 0


def tensor(shape: bytes, stride: bytes, storage: bytes = FLOATS) -> bytes:
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"K\x00" + shape + stride + b"\x89NtR"


def integer(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def deep(levels: int) -> bytes:
    return b")" + b"\x85" * levels  # a tuple in a tuple in …


LISTED = b"](" + b"N" * 500_000 + b"e\x94"  # a list of half a million, remembered as 0
AGAIN = name("torch", "Size") + b"h\x00\x85R0"
COLLIDING = b"".join(integer(i * (2**61 - 1)) + b"N" for i in range(1, 3))
EXPENSIVE = {
    "a list copied again and again": (emit(LISTED, AGAIN * 50, b"N"), "again and again"),
    "arguments copied again and again": (
        emit(b"(" + b"N" * 500_000 + b"t\x94", (name("torch.nn", "Module") + b"h\x00R0") * 50, b"N"),
        "again and again",
    ),
    "a key deeper than the stack": (emit(b"}", deep(100_000), b"Ns"), "a key of a dict is a tuple"),
    "such keys at a time": (emit(b"}(", deep(100_000), b"Nu"), "a key of a dict is a tuple"),
    "such a key in an old dict": (emit(b"(", deep(100_000), b"Nd"), "a key of a dict is a tuple"),
    "such a key of a function": (
        emit(name("collections", "OrderedDict"), b"](", deep(100_000), b"N\x86e\x85R"),
        "a key of a dict is a tuple",
    ),
    "such a member of a set": (emit(b"\x8f(", deep(100_000), b"\x90"), "a key of a dict is a tuple"),
    "such a member of a frozen set": (emit(b"(", deep(100_000), b"\x91"), "a key of a dict is a tuple"),
    "a function that calls itself": (
        emit(b"))" + (name("torch._tensor", "_rebuild_from_type_v2") + b"N\x87") * 3, b"0N"),
        "not a whole pickle|holds no state dict",
    ),
    "a function by way of another": (
        emit(name("torch._tensor", "_rebuild_from_type_v2"), b"(", name("collections", "OrderedDict"), b"N)NtR"),
        "something that makes none",
    ),
    "keys that collide": (emit(b"}(", COLLIDING, b"u"), "a key of a dict is a int"),
    "a key that is not finite": (emit(b"}(G\x7f\xf8\x00\x00\x00\x00\x00\x00Nu"), "a key of a dict is a float"),
    "more bytes than there are": (emit(b"\x96" + (2**40).to_bytes(8, "little")), "reach beyond it"),
    "a string of 2**40 bytes": (emit(b"\x8d" + (2**40).to_bytes(8, "little")), "not a whole pickle"),
    "a frame of 2**40 bytes": (emit(b"\x95" + (2**40).to_bytes(8, "little")), "not a whole pickle"),
    "a number of 5,000 digits": (b"I" + b"9" * 5000 + b"\n.", "not a whole pickle"),
    "a tensor of many axes": (
        emit(b"}\x8c\x01a", tensor(b"(" + b"K\x01" * 99 + b"t", b"(" + b"K\x01" * 99 + b"t"), b"s"),
        "has 99 axes",
    ),
    "a view by halves": (
        emit(FLOATS[:-2], b"(NG?\xe0\x00\x00\x00\x00\x00\x00K\x01ttQ"),
        "reaches beyond the one it is a view of",
    ),
    "a dtype that nothing holds": (
        emit(
            *(b"}\x8c\x01a", name("torch._utils", "_rebuild_tensor_v3"), b"(", FLOATS, b"K\x00K\x01\x85K\x01\x85\x89N"),
            *(name("torch", "quint8"), b"tR", b"s"),
        ),
        "unknown dtype torch.quint8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPENSIVE)
@pytest.mark.parametrize("write", [archive, legacy])
def test_a_pickle_that_asks_for_much_is_refused(tmp_path, write, case):
    data, expected = EXPENSIVE[case]
    records = {"records": {"data/0": bytes(16)}} if write is archive else {}
    if write is archive:
        archive(tmp_path / "evil.ckpt", data, **records["records"])
    else:
        write(tmp_path / "evil.ckpt", data)
    assert re.search(expected, reason(tmp_path / "evil.ckpt"))


def test_a_pickle_longer_than_any_checkpoints(tmp_path):
    archive(tmp_path / "evil.ckpt", emit(b"N0" * LENGTH, b"}"))
    assert "its pickle has more than" in reason(tmp_path / "evil.ckpt")


def test_a_record_that_says_it_is_larger_than_the_file(tmp_path):
    archive(tmp_path / "evil.ckpt", emit(b"}"))
    content = (tmp_path / "evil.ckpt").read_bytes()
    start = content.index(b"PK\x01\x02")  # of the list of records: its first is data.pkl
    for size in (2**31, 2**32 - 2):
        changed = content[: start + 20] + size.to_bytes(4, "little") * 2 + content[start + 28 :]
        (tmp_path / "evil.ckpt").write_bytes(changed)
        assert "cut off" in reason(tmp_path / "evil.ckpt")


def test_storages_beyond_the_end_of_any_file(tmp_path):
    keys = pickle.dumps(["0", "0"], protocol=2)
    head = [pickle.dumps(part, protocol=2) for part in (LEGACY, 1001, {"little_endian": True})]
    body = emit(b"}\x8c\x01a", tensor(b"K\x04\x85", b"K\x01\x85"), b"s")
    (tmp_path / "evil.ckpt").write_bytes(b"".join([*head, body, keys, b"\xff" * 8]))
    assert "beyond the end of any file" in reason(tmp_path / "evil.ckpt")


def test_a_header_of_safetensors_longer_than_any(tmp_path):
    path = tmp_path / "evil.safetensors"
    with path.open("wb") as file:
        file.write((2**25).to_bytes(8, "little") + b"{")
        file.truncate(2**25 + 8)
    assert "is it whole" in reason(path)


def test_a_tensor_that_repeats_its_numbers_is_not_read(tmp_path):
    archive(
        tmp_path / "evil.ckpt",
        emit(b"}\x8c\x01a", tensor(integer(2**40) + b"\x85", b"K\x00\x85"), b"s"),
        **{"data/0": bytes(16)},
    )
    with TensorFile(tmp_path / "evil.ckpt") as file, pytest.raises(ValueError, match="a repeats its numbers"):
        file.read("a")
