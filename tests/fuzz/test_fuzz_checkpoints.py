"""Base checkpoints, released concepts, and pickles of any kind."""

import io
import pickle
import struct
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from fuzz_guard import read
from fuzz_mutations import as_json, changed, mutated
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from infusion.concepts.released import ReleasedFile
from ldm.weights.files import LEGACY, TensorFile
from ldm.weights.recognise import recognise

TENSORS = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 3), "b": torch.arange(4), "c": torch.zeros(0)}
RELEASED = {
    "target_input": torch.ones(1, 768),
    "global_step": 3,
    "target_output": {"x.to_v.target_output": torch.ones(4)},
}


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module: str, function: str) -> bytes:
    return text(module) + text(function) + b"\x93"


NAMES = [
    *[("torch._utils", f"_rebuild_{kind}") for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter")],
    *[("torch._tensor", "_rebuild_from_type_v2"), ("torch", "Size"), ("torch", "float16"), ("torch", "FloatStorage")],
    *[("collections", "OrderedDict"), ("collections", "Counter"), ("torch.nn", "Module"), ("os", "system")],
    *[
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("builtins", "set"),
        ("numpy", "dtype"),
        ("copyreg", "_reconstructor"),
    ],
]
OPCODES = [bytes([code]) for code in sorted(pickle._Unpickler.dispatch)]
PIECE = st.one_of(
    st.sampled_from(OPCODES),
    st.sampled_from([name(*names) for names in NAMES]),
    st.sampled_from(
        [
            text("storage"),
            text("0"),
            text("cpu"),
            text("state_dict"),
            text(""),
            b"K\x01",
            b"K\x00",
            b"J\xff\xff\xff\xff",
        ]
    ),
    st.sampled_from(
        [b"(", b")", b"]", b"}", b"N", b"\x88", b"t", b"R", b"Q", b"s", b"u", b"e", b"b", b"\x94", b"h\x00", b"\x85"]
    ),
    st.sampled_from(
        [b"I" + b"9" * 99 + b"\n", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"G\x7f\xf8" + bytes(6), b"B" + b"\xff" * 4]
    ),
    st.binary(max_size=6),
)
PICKLE = st.lists(PIECE, max_size=40).map(lambda parts: b"\x80\x04" + b"".join(parts) + b".")


@cache
def whole(kind: str) -> bytes:
    if kind == "safetensors":
        return save(TENSORS, {"modelspec.architecture": "stable-diffusion-v1"})
    file = io.BytesIO()
    content = RELEASED if kind == "released" else {"state_dict": TENSORS, "epoch": 1, "hyper": {"lr": 0.1}}
    torch.save(content, file, _use_new_zipfile_serialization=kind != "legacy")
    return file.getvalue()


def archive(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as records:
        for record, content in {"data.pkl": data, "version": b"3\n", "data/0": bytes(16)}.items():
            records.writestr(f"archive/{record}", content)
    return file.getvalue()


def load(folder: Path, content: bytes) -> None:
    """Reads a file as commands do: what it is, every tensor of it, and what was learned where it is a concept."""
    path = folder / "base.ckpt"
    path.write_bytes(content)

    def reader(path: Path) -> bool:
        with TensorFile(path) as file:
            recognise(file)
            for name in file.shapes:
                file.read(name)
        return True

    def released(path: Path) -> bool:
        with ReleasedFile(path) as file:
            file.residuals("to_v")
        return True

    read(reader, path)
    read(released, path)


@pytest.mark.parametrize("kind", ["safetensors", "archive", "legacy", "released"])
@given(data=st.data())
def test_bytes_of_checkpoints(folder, kind, data):
    load(folder, data.draw(mutated(whole(kind))))


@given(data=st.data())
def test_headers_of_safetensors(folder, data):
    content = whole("safetensors")
    length = struct.unpack("<Q", content[:8])[0]
    import json

    header = as_json(data.draw(changed(json.loads(content[8 : 8 + length]))))
    load(folder, struct.pack("<Q", len(header)) + header + content[8 + length :])


@given(data=PICKLE)
def test_any_pickle_in_an_archive(folder, data):
    load(folder, archive(data))


@given(data=PICKLE)
def test_any_pickle_in_an_old_file(folder, data):
    head = [pickle.dumps(part, protocol=2) for part in (LEGACY, 1001, {"little_endian": True})]
    load(folder, b"".join([*head, data, pickle.dumps(["0"], protocol=2), struct.pack("<Q", 4), bytes(16)]))


@given(data=st.data())
def test_pickles_of_checkpoints_with_other_bytes(folder, data):
    with zipfile.ZipFile(io.BytesIO(whole("archive"))) as records:
        pickled = next(records.read(record) for record in records.namelist() if record.endswith("data.pkl"))
    load(folder, archive(data.draw(mutated(pickled))))


@given(data=st.lists(PICKLE, max_size=6))
def test_pickles_behind_each_other(folder, data):
    load(folder, b"".join(data))
