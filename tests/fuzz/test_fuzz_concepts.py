"""Concept files of every form and method, and files of covariances."""

import json
import struct
import zlib
from functools import cache
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from infusion.concepts import FORMS, compact
from infusion.concepts.concept import Concept
from infusion.concepts.file import read as contents
from infusion.covariance import InverseCovariance, save_inverse
from infusion.gate import Gate
from infusion.methods import method_names, method_of
from ldm.util.cli import UserError
from tests.fuzz.guard import read
from tests.fuzz.mutations import ODD_TEXT, ODD_VALUE, as_json, changed, mutated

LAYER = "middle_block.1.transformer_blocks.0.attn2"
OPTIONS = {"lora": {"rank": 2, "alpha": 2.0, "identifier": "sks"}, "dreambooth": {"identifier": "sks"}}


@cache
def whole(folder: Path, method: str, form: str) -> bytes:
    """A small concept file as the command writes it."""
    torch.manual_seed(0)
    names = (f"{LAYER}.to_q.weight.down", f"{LAYER}.to_q.weight.up") if method == "lora" else (LAYER, "tokens")
    concept = Concept(
        tensors={name: torch.randn(2, 6) for name in names},
        superclass="cat",
        templates=("a photo of a {}", "{}"),
        architecture="pocket",
        base_hash="ab" * 32,
        gate=Gate(),
        covariance="cd" * 32,
        method=method,
        attention="own",
        options=OPTIONS.get(method, {}),
        steps=7,
        learning_rate=0.1,
        seed=3,
        date="2024-05-01",
    )
    concept.save(folder / "whole.safetensors", form)
    return (folder / "whole.safetensors").read_bytes()


def split(content: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + data


def load(folder: Path, content: bytes) -> None:
    """Reads a file as every command does; what is read can be saved, and is the same when read again."""
    path = folder / "concept.safetensors"
    path.write_bytes(content)
    concept = read(Concept.load, path)
    if concept is None:
        read(contents, path)
        return
    read(method_of, concept)
    assert all(torch.isfinite(tensor).all() for tensor in concept.tensors.values())
    concept.save(folder / "again.safetensors")
    again = Concept.load(folder / "again.safetensors")
    assert again.metadata() == concept.metadata() and again.relative_error(concept) == 0


FILE = st.tuples(st.sampled_from(method_names()), st.sampled_from(FORMS))


@given(file=FILE, data=st.data())
def test_bytes_of_concept_files(folder, file, data):
    load(folder, data.draw(mutated(whole(folder, *file))))


@given(file=FILE, data=st.data())
def test_headers_of_concept_files(folder, file, data):
    header, tensors = split(whole(folder, *file))
    for _ in range(data.draw(st.integers(1, 3))):
        header = data.draw(changed(header))
    load(folder, joined(header, tensors))


@given(file=FILE, data=st.data())
def test_metadata_of_concept_files(folder, file, data):
    """Values of the right type, so that it is ours that refuses them and not safetensors."""
    header, tensors = split(whole(folder, *file))
    said = header["__metadata__"]
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(said)))
        said = said | {key: data.draw(ODD_TEXT | ODD_VALUE.map(json.dumps))}
    header["__metadata__"] = said
    if file[1] == "compact":
        header, tensors = checksummed(header, tensors)
    load(folder, joined(header, tensors))


def checksummed(header: dict, tensors: bytes, description: object = None) -> tuple[dict, bytes]:
    """A compact file's streams with the checksum that its reader expects."""
    start, end = header["layers"]["data_offsets"]
    numbers = tensors[slice(*header["numbers"]["data_offsets"])]
    said = json.loads(zlib.decompress(tensors[start:end])) if description is None else description
    if isinstance(said, dict):
        text = json.dumps(dict(header["__metadata__"]), sort_keys=True).encode()
        said = said | {"crc32": zlib.crc32(text + numbers)}
    stream = zlib.compress(as_json(said), 9)
    places = {"layers": [0, len(stream)], "numbers": [len(stream), len(stream) + len(numbers)]}
    parts = {
        name: {"dtype": "U8", "shape": [stop - begin], "data_offsets": [begin, stop]}
        for name, (begin, stop) in places.items()
    }
    return {"__metadata__": header["__metadata__"], **parts}, stream + numbers


@given(data=st.data())
def test_descriptions_of_compact_files(folder, data):
    """Behind the checksum, which anyone can compute."""
    header, tensors = split(whole(folder, "infusion", "compact"))
    start, end = header["layers"]["data_offsets"]
    said = json.loads(zlib.decompress(tensors[start:end]))
    for _ in range(data.draw(st.integers(1, 3))):
        said = data.draw(changed(said))
    load(folder, joined(*checksummed(header, tensors, said)))


@given(data=st.data())
def test_numbers_of_compact_files(folder, data):
    header, tensors = split(whole(folder, "infusion", "compact"))
    start, end = header["layers"]["data_offsets"]
    said = json.loads(zlib.decompress(tensors[start:end]))
    for layer in said["layers"].values():
        layer[1] = data.draw(st.integers(0, compact.PEAK))
        layer[2] = data.draw(st.integers(1, 2**40))
        layer[0] = data.draw(st.lists(st.integers(0, 300), max_size=3))
    load(folder, joined(*checksummed(header, tensors, said)))


@given(content=st.binary(max_size=200) | st.builds(joined, ODD_VALUE, st.binary(max_size=40)))
def test_any_bytes_and_any_json_for_a_header(folder, content):
    load(folder, content)


def test_the_streams_that_are_changed_are_those_of_a_file(folder):
    header, tensors = split(whole(folder, "infusion", "compact"))
    header, tensors = checksummed(header, tensors)
    (folder / "same.safetensors").write_bytes(joined(header, tensors))
    assert Concept.load(folder / "same.safetensors").superclass == "cat"


def shortly(path: Path) -> InverseCovariance:
    """As commands show its messages."""
    try:
        return InverseCovariance(path)
    except UserError as error:
        raise UserError(str(error)[:400]) from error


@given(data=st.data())
def test_covariance_files(folder, data):
    save_inverse(folder / "whole.safetensors", torch.eye(3), {"base_architecture": "pocket"})
    content = (folder / "whole.safetensors").read_bytes()
    header, tensors = split(content)
    content = data.draw(st.one_of(mutated(content), changed(header).map(lambda value: joined(value, tensors))))
    (folder / "covariance.safetensors").write_bytes(content)
    inverse = read(shortly, folder / "covariance.safetensors")
    assert inverse is None or inverse.matrix.isfinite().all()
