"""Prompts, files of prompts, text of PNGs."""

import struct
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from infusion.sampling.png import KNOWN, defaults, describe, recall
from infusion.sampling.prompts import read_jobs
from infusion.sampling.regions import regions
from infusion.sampling.settings import Settings
from infusion.tokens import concept_places, fill, point
from ldm.models.tokenizer import Tokenizer
from ldm.util import cli
from ldm.util.cli import UserError
from tests.fuzz.guard import read
from tests.fuzz.mutations import ODD_TEXT, mutated

SAID = describe(Settings(), {"prompt": "a {}", "seed": 3, "config": "c.yaml"}, {"base_sha256": "ab"})
PIECE = st.one_of(
    st.sampled_from(
        ["{}", "{1}", "{2}", "{0}", "{999999}", " ", "a", "cat", "a photo of a ", "{", "}", ",", "\n", "--n", "é"]
    ),
    ODD_TEXT,
)
PROMPT = st.lists(PIECE, max_size=30).map("".join)
VALUE = st.one_of(st.sampled_from([" 1", " 512", " 0", " 1e3", " nan", " -1", ""]), ODD_TEXT)
LINE = st.tuples(PROMPT, st.lists(st.tuples(st.sampled_from(list("nwhslqd")), VALUE), max_size=4)).map(
    lambda parts: parts[0] + "".join(f" --{letter}{value}" for letter, value in parts[1])
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(merges=2000, context_length=16)


@given(lines=st.lists(LINE, max_size=6), end=st.sampled_from(["\n", "\r\n", "\r", "\u2028"]))
def test_files_of_prompts(lines, end):
    jobs = read(read_jobs, end.join(lines), Settings())
    assert jobs is None or all(job.prompt.strip() for job in jobs)


@given(template=PROMPT, nouns=st.lists(ODD_TEXT | st.sampled_from(["cat", "stuffed animal"]), max_size=3))
def test_placeholders(tokenizer, template, nouns):
    found = read(concept_places, tokenizer, template, nouns)
    filled = read(fill, template, nouns)
    if found is not None:
        prompt, places = found
        assert prompt == filled and places.shape == (len(nouns), 16) and places.min() >= -1


@given(prompt=PROMPT, words=st.lists(ODD_TEXT | st.sampled_from(["cat", "a", "photo of"]), max_size=3))
def test_words_of_a_prompt(prompt, words):
    read(point, prompt, words)


@given(text=st.one_of(ODD_TEXT, st.text(alphabet="0123456789:,. -e", max_size=40)))
def test_regions_and_numbers(text):
    text = text[:200]  # argparse shows what it refuses
    read(regions, text)
    for convert in (cli.number, cli.numbers, cli.words, cli.count, cli.seed):
        read(_argument, convert, text)


def _argument(convert, text: str):
    """As argparse calls it."""
    from argparse import ArgumentTypeError

    try:
        return convert(text)
    except (ArgumentTypeError, ValueError) as error:
        raise UserError(str(error)) from error


@given(content=st.data())
def test_bytes_of_pngs(folder, content):
    info = PngImagePlugin.PngInfo()
    for key, value in SAID.items():
        info.add_text(key, value, zip=content.draw(st.booleans()))
    Image.new("RGB", (4, 4)).save(folder / "a.png", pnginfo=info)
    (folder / "a.png").write_bytes(content.draw(mutated((folder / "a.png").read_bytes())))
    said = read(recall, folder / "a.png")
    assert said is None or set(said) <= set(KNOWN)


KIND = st.sampled_from(
    [b"tEXt", b"zTXt", b"iTXt", b"IHDR", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"pHYs", b"tRNS", b"IDAT", b"xxXx"]
)
DATA = st.one_of(
    st.binary(max_size=30),
    st.tuples(st.sampled_from(KNOWN), ODD_TEXT).map(lambda one: f"{one[0]}\0{one[1]}".encode(errors="surrogatepass")),
    st.tuples(st.sampled_from(KNOWN), ODD_TEXT).map(
        lambda one: f"{one[0]}\0\0".encode() + zlib.compress(one[1].encode(errors="surrogatepass"))
    ),
    st.tuples(st.sampled_from(KNOWN), ODD_TEXT, st.sampled_from([b"\0\0", b"\1\0", b"\1\1", b"\2\0"])).map(
        lambda one: f"{one[0]}\0".encode() + one[2] + b"\0\0" + one[1].encode(errors="surrogatepass")
    ),
)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@given(
    size=st.tuples(*[st.sampled_from([0, 1, 4, 10_000, 2**16, 2**31 - 1, 2**32 - 1])] * 2),
    mode=st.binary(min_size=5, max_size=5) | st.just(b"\x08\x02\0\0\0"),
    chunks=st.lists(st.tuples(KIND, DATA), max_size=8),
    whole=st.booleans(),
)
def test_chunks_of_pngs(folder, size, mode, chunks, whole):
    """Each with its right checksum."""
    usual = [(b"tEXt", f"{key}\0{value}".encode()) for key, value in SAID.items()] if whole else []
    head = chunk(b"IHDR", struct.pack(">II", *size) + mode)
    body = b"".join(chunk(*one) for one in [*usual, *chunks, (b"IDAT", b"")])
    (folder / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)
    said = read(recall, folder / "c.png")
    assert said is None or all(isinstance(value, str) and key in KNOWN for key, value in said.items())


@pytest.fixture(scope="module")
def command():
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    try:
        import infusion_txt2img

        yield infusion_txt2img
    finally:
        sys.path.pop(0)


@given(data=st.data())
def test_text_of_pngs(folder, command, data):
    """What a picture says becomes flags; none is one that it may not set."""
    said = dict(SAID)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from([*KNOWN, "outdir", "device", "devices", "skip_save", "from_file"]))
        said[key] = data.draw(
            ODD_TEXT | st.sampled_from(["ddim", "1", "0.5,0.5", "a.safetensors", "1:0,0,1,1", "-1", "nan"])
        )
    info = PngImagePlugin.PngInfo()
    for key, value in said.items():
        try:
            info.add_itxt(key, value)
        except UnicodeEncodeError:  # a half of a pair is no text, and no file has it
            continue
    Image.new("RGB", (4, 4)).save(folder / "b.png", pnginfo=info)
    found = read(command.parse, ["--from-png", str(folder / "b.png")])
    if found is not None:
        usual = command.parse(["--prompt", "a"])
        assert (found.outdir, found.device, found.devices) == (usual.outdir, usual.device, usual.devices)
        assert found.skip_save is False and found.from_file is None
        assert set(defaults(found.said)) <= {*KNOWN, "n_samples", "n_iter"}
