from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from infusion.covariance import InverseCovariance, estimate, invert
from ldm.pipeline import StableDiffusion
from ldm.weights.checkpoint import sha256
from scripts.estimate_C_inv import main

CAPTIONS = [f"a photo of {number} {noun}" for number in ("one", "two", "three") for noun in ("cats", "hats", "teapots")]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("\n\n".join(CAPTIONS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def run(tiny: Path, captions: Path, tmp_path: Path):
    """Runs the command on the tiny backbone; returns the file that it writes."""

    def command(*arguments: object) -> Path:
        saved = tmp_path / "new" / "c.safetensors"
        words = ["--caption", captions, "--save_path", saved, "--config", tiny, "--device", "cpu", *arguments]
        main(list(map(str, words)))
        return saved

    return command


@pytest.fixture
def refused(run, capsys):
    """The one line that the command ends with, with exit code 2."""

    def command(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return command


@pytest.mark.parametrize("arguments", [[], ["--batch_size", "2", "--ridge", "0.5", "--type", "clip"]])
def test_writes_the_inverse_and_what_it_is_of(run, tiny, arguments):
    path = run(*arguments)
    ridge = 0.5 if arguments else 0.001
    sd = StableDiffusion.from_checkpoint(tiny)
    covariance = estimate(sd.text, CAPTIONS)
    expected, _, after = invert(covariance.matrix, ridge)
    read = InverseCovariance(path)
    # the batch size changes an encoding in its last bits, and the inverse enlarges that by the condition number
    torch.testing.assert_close(read.matrix, expected.float(), rtol=0, atol=1e-5 * after * expected.abs().max().item())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = sha256(tiny.with_name("tiny.safetensors"))
    assert float(metadata.pop("condition")) == pytest.approx(after, rel=0.01)
    assert metadata == {
        "format": "infusion-covariance", "format_version": "1", "base_architecture": "tiny", "base_sha256": weights,
        "captions": "9", "captions_cut": "0", "tokens": str(covariance.tokens), "ridge": str(ridge),
    }  # fmt: skip
    read.check_base("tiny", weights, 24)


def test_the_text_encoder_may_have_a_file_of_its_own(run, tiny, tmp_path, recwarn):
    other = StableDiffusion.from_config(tiny).text.state_dict()
    save_file(other, tmp_path / "text.safetensors")
    read = InverseCovariance(run("--part", f"text={tmp_path / 'text.safetensors'}"))
    sd = StableDiffusion.from_checkpoint(tiny, parts={"text": tmp_path / "text.safetensors"})
    expected, _, _ = invert(estimate(sd.text, CAPTIONS).matrix, 0.001)
    torch.testing.assert_close(read.matrix, expected.float(), rtol=0.1, atol=1e-3 * expected.abs().max().item())
    read.check_base("tiny", sd.digests["text"], 24)
    assert read.base_hash == sd.parts["text"] != sd.hash and not recwarn.list


def test_reports_captions_tokens_and_condition(run, caplog):
    caplog.set_level("INFO")
    path = run()
    counts, condition, written = (record.message for record in caplog.records[-3:])
    assert counts == "9 captions, 48 word tokens"
    assert condition.startswith("condition number ") and ", with the ridge " in condition
    before, after = (float(word) for word in condition.removeprefix("condition number ").split(", with the ridge "))
    assert before > after > 1
    assert written == f"{path}: 24 × 24, {InverseCovariance(path).fingerprint[:12]}"


@pytest.mark.parametrize(
    ("words", "cut"),  # of each caption; the tiny model reads 14
    [([14, 13], 0), ([14, 15], 1), ([15, 400, 14, 30], 3)],
)
def test_captions_that_are_cut_are_counted_once_and_in_the_file(run, captions, caplog, words, cut):
    captions.write_text("\n".join([*CAPTIONS, *("red " * count for count in words)]))
    with safe_open(run("--batch_size", "2"), "pt") as file:
        metadata = file.metadata()
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    of = 9 + len(words)
    warning = f"warning: {cut} of {of} captions have more than the 14 tokens that are read: the rest is left out"
    assert said == ([warning] if cut else [])
    assert metadata["captions_cut"] == str(cut) and metadata["captions"] == str(of)


def test_nothing_is_overwritten_unasked(run, refused):
    path = run()
    before = path.read_bytes()
    assert refused().startswith(f"error: --save_path: {path} exists already; name another file, or give --overwrite")
    assert path.read_bytes() == before
    run("--overwrite", "--ridge", "0.5")
    assert path.read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--caption", "gone.txt"], "error: --caption: there is no file gone.txt"),
        (["--part", "text=gone.safetensors"], "error: --part: there is no file gone.safetensors"),
        (["--part", "vae=x.safetensors"], "--part: of the base model the text encoder alone is read, not the vae"),
        (["--config", "gone.yaml"], "error: gone.yaml: no such config file"),
        (["--type", "openclip"], "error: --type: openclip was asked for, and "),
        (["--ridge", "0"], "or more"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(refused, tmp_path, arguments, complaint):
    line = refused(*arguments)
    assert line.startswith("error: ") and complaint in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a cat\n", "1 captions with 2 word tokens are too few: the covariance of encodings 24 wide is singular"),
        (b"\n  \n", "captions.txt has no caption in it"),
        ("ein Bär\n".encode("latin-1"), "captions.txt: cannot be read as text: save it as UTF-8"),
    ],
)
def test_captions_that_will_not_do(refused, captions, tmp_path, content, complaint):
    captions.write_bytes(content)
    assert complaint in refused()
    assert not (tmp_path / "new").exists()


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_encoded(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(["--caption", "nowhere.txt", "--save_path", str(tmp_path / "file/c.safetensors")])
    assert ended.value.code == 2
    assert f"--save_path: {tmp_path}/file: is a file; name a folder to write to" in capsys.readouterr().err
