"""Base checkpoints and released concepts whose bytes are others."""

import io
import pickle
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from infusion.concepts import released
from ldm.weights.files import TensorFile
from ldm.weights.recognise import recognise
from tests.fuzz.guard import read
from tests.fuzz.mutations import mutated

TENSORS = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 3), "b": torch.arange(4), "c": torch.zeros(0)}
RELEASED = {
    "target_input": torch.ones(1, 768),
    "global_step": 3,
    "target_output": {"middle_block.1.transformer_blocks.0.attn2.to_v.target_output": torch.ones(1280)},
}
NAMES = [b"torch._utils\n_rebuild_parameter", b"collections\nOrderedDict", b"torch.nn\nModule", b"os\nsystem",
         b"__builtin__\neval", b"__builtin__\ngetattr", b"__builtin__\nset", b"numpy\ndtype"]  # fmt: skip
PIECE = st.one_of(
    st.sampled_from([bytes([code]) for code in sorted(pickle._Unpickler.dispatch)]),
    st.sampled_from([b"c" + name + b"\n" for name in NAMES]),
    st.sampled_from([b"(", b")", b"]", b"}", b"N", b"t", b"R", b"Q", b"s", b"u", b"e", b"b", b"K\x01", b"U\x01a"]),
    st.binary(max_size=6),
)


@cache
def whole(kind: str) -> bytes:
    if kind == "safetensors":
        return save(TENSORS, {"modelspec.architecture": "stable-diffusion-v1"})
    file = io.BytesIO()
    content = RELEASED if kind == "released" else {"state_dict": TENSORS, "epoch": 1, "hyper": {"lr": 0.1}}
    torch.save(content, file, _use_new_zipfile_serialization=kind != "legacy")
    return file.getvalue()


def load(folder: Path, content: bytes) -> None:
    """Reads a file as commands do: what it is, every tensor of it, and what was learned where it is a concept."""
    path = folder / "base.ckpt"
    path.write_bytes(content)

    def reader(path: Path) -> None:
        with TensorFile(path) as file:
            recognise(file)
            for name in file.shapes:
                file.read(name).float()

    read(reader, path)
    read(released.load, path, "cat")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["safetensors", "archive", "legacy", "released"])
@given(data=st.data())
def test_bytes_of_checkpoints(folder, kind, data):
    load(folder, data.draw(mutated(whole(kind))))


@given(data=st.lists(PIECE, max_size=40).map(lambda parts: b"\x80\x02" + b"".join(parts) + b"."))
def test_any_pickle_in_an_archive(folder, data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as records:
        for record, content in {"data.pkl": data, "version": b"3\n", "data/0": bytes(16)}.items():
            records.writestr(f"archive/{record}", content)
    load(folder, file.getvalue())
