"""What `.ckpt` files may and may not do. A canary is a file that a hostile pickle makes if it gets to run."""

import argparse
import functools
import io
import json
import os
import pickle
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
from safetensors.torch import load, save_file
from torch import Tensor

from ldm.weights.files import LEGACY, TensorFile, pieces, serialise


class Call:
    """Pickles as a call of a function, with a state if there is one."""

    def __init__(self, function: Callable, *args: object, state: object = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple:
        return self.reduced


def touch(path: Path) -> str:
    return f"open({str(path)!r}, 'w').close()"


def bomb(canary: Path) -> bytes:
    file = io.BytesIO()
    torch.save(Call(os.mkdir, str(canary)), file)
    return file.getvalue()


HOSTILE: dict[str, Callable[[Path], object]] = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "os.mkdir as a key": lambda canary: {(Call(os.mkdir, str(canary)),): 1},
    "eval": lambda canary: Call(eval, touch(canary)),
    "exec in a list": lambda canary: [[Call(exec, touch(canary))]],
    "in the arguments of what is harmless": lambda canary: Call(list, (Call(os.mkdir, str(canary)),)),
    "in the state of what is harmless": lambda canary: Call(OrderedDict, state={"x": Call(os.mkdir, str(canary))}),
    "subprocess": lambda canary: Call(subprocess.check_call, ["touch", str(canary)]),
    "a function of a library": lambda canary: Call(Path.touch, canary),
    "numpy objects": lambda canary: np.array([Call(os.mkdir, str(canary))], dtype=object),
    "partial": lambda canary: Call(functools.partial(os.mkdir, str(canary))),
    "partial of what is inert": lambda canary: Call(functools.partial(Path.touch, canary)),
    "getattr": lambda canary: Call(Call(getattr, Call(__import__, "os"), "mkdir"), str(canary)),
    "a class": lambda canary: Call(type, "X", (), {"x": Call(os.mkdir, str(canary))}),
    "torch.load": lambda canary: Call(torch.load, Call(io.BytesIO, bomb(canary))),
    "a storage's bytes": lambda canary: Call(torch.storage._load_from_bytes, bomb(canary)),
}


def archive(path: Path, data: bytes, **records: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {"data.pkl": data, "version": b"3\n", **records}.items():
            file.writestr(f"archive/{name}", content)


def legacy(path: Path, data: bytes) -> None:
    head = [pickle.dumps(part, protocol=2) for part in (1001, {"little_endian": True})]
    path.write_bytes(b"".join([LEGACY, *head, data, pickle.dumps([], protocol=2)]))


def plain(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def reason(path: Path) -> str:
    """Why a file is refused: one line that begins with its name and does not tempt anyone to trust it."""
    with pytest.raises(ValueError) as error:
        TensorFile(path)
    text = str(error.value)
    assert text.startswith(f"{path}: not a file of tensors that can be read safely (") and "\n" not in text
    assert len(text) < 400 + len(str(path)) and "trust" not in text and "weights_only=False" not in text
    return text


@pytest.mark.parametrize("write", [archive, legacy, plain])
@pytest.mark.parametrize("name", HOSTILE)
def test_no_pickle_runs_anything(tmp_path, write, name):
    canary, path = tmp_path / "canary", tmp_path / "evil.ckpt"
    for nested in (False, True):
        for protocol in range(6):
            content = HOSTILE[name](canary)
            try:
                data = pickle.dumps({"state_dict": {"weight": content}} if nested else content, protocol=protocol)
            except pickle.PicklingError:  # protocol 0 has only text for a name
                continue
            write(path, data)
            try:
                TensorFile(path)
            except ValueError:
                reason(path)
            assert not canary.exists()
    if write is plain and name not in ("torch.load", "a storage's bytes", "partial", "getattr", "a class"):
        pickle.loads(data)  # the payload is live
        assert canary.exists()


@pytest.mark.parametrize("write", [archive, legacy])
@pytest.mark.parametrize("name", ["os.system", "eval", "exec in a list", "subprocess", "numpy objects"])
def test_what_no_checkpoint_names_is_refused(tmp_path, write, name):
    write(tmp_path / "evil.ckpt", pickle.dumps(HOSTILE[name](tmp_path / "canary"), protocol=2))
    assert "nothing of it ran" in reason(tmp_path / "evil.ckpt")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_archives_of_something_else_are_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1)), path)
    reason(path)
    archive(path, pickle.dumps({}, protocol=2), **{"constants.pkl": b""})
    assert "torchscript" in reason(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "<xml/>")
    reason(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps({"a": "a" * 1000}))
    assert "compressed" in reason(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is it whole?"),
        (b"a text", "is it whole?"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "is it whole?"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "`git lfs pull`"),
        (b"\n<!doctype html><title>Sign in</title>", "a web page"),
        (bytes(257) + b"ustar" + bytes(250), "is it whole?"),
        ((2**25).to_bytes(8, "little") + b"{" + bytes(2**25), "is it whole?"),
        (pickle.dumps({"a": 1}), "is it whole?"),
    ],
)
def test_files_of_something_else_say_what_they_are(tmp_path, content, says):
    (tmp_path / "a.ckpt").write_bytes(content)
    assert says in reason(tmp_path / "a.ckpt")


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
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_those_that_were_saved(tmp_path, zipped):
    saved = tensors() | ({"uint16": torch.arange(5).to(torch.uint16)} if zipped else {})
    torch.save(saved, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    with TensorFile(tmp_path / "a.ckpt") as file:
        assert file.format == ("pickle" if zipped else "legacy pickle")
        assert file.shapes == {name: tuple(tensor.shape) for name, tensor in saved.items()}
        for name, tensor in saved.items():
            assert file.dtypes[name] == tensor.dtype == file.read(name).dtype
            assert torch.equal(file.read(name), tensor.detach()) and not file.read(name).requires_grad


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
        assert tuple(file.content) == tuple(content)
        assert set(file.shapes) == {"weight", "bias"}
        assert torch.equal(file.read("weight"), weights.weight)


def test_endings_do_not_matter(tmp_path):
    saved = {"a": torch.randn(3)}
    save_file(saved, tmp_path / "a.ckpt", metadata={"x": "y"})
    torch.save(saved, tmp_path / "a")
    for name, format in (("a.ckpt", "safetensors"), ("a", "pickle")):
        with TensorFile(tmp_path / name) as file:
            assert file.format == format and torch.equal(file.read("a"), saved["a"])
            assert file.metadata == ({"x": "y"} if format == "safetensors" else {})
    torch.save(saved, tmp_path / "a.safetensors")
    assert "let its name end in .ckpt" in reason(tmp_path / "a.safetensors")


def test_what_is_no_state_dict_is_refused(tmp_path):
    torch.save({"a"}, tmp_path / "a.ckpt")
    assert "holds no state dict but a set" in reason(tmp_path / "a.ckpt")
    content: dict = {}
    content["state_dict"] = content
    archive(tmp_path / "a.ckpt", pickle.dumps(content, protocol=2))
    with TensorFile(tmp_path / "a.ckpt") as file:
        assert file.shapes == {}


def test_what_is_written_is_what_the_library_reads():
    """Every type and shape, whatever the order of tensors and metadata; each tensor begins where its type may."""
    said = {"b": "é", "a": "1"}
    content = serialise(tensors(), said)
    assert content == serialise(dict(reversed(tensors().items())), dict(reversed(said.items())))
    found = load(content)
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == said and length % 8 == 0
    for name, place in header.items():
        assert place["data_offsets"][0] % tensors()[name].element_size() == 0


def test_what_is_written_is_not_copied_first():
    tensor = torch.randn(64, 64)
    _, piece = pieces({"a": tensor}, {})
    assert np.asarray(piece).ctypes.data == tensor.data_ptr()
