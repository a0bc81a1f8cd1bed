from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from infusion.covariance import (
    MOST,
    InverseCovariance,
    estimate,
    invert,
    read_captions,
    save_inverse,
    word_tokens,
)
from infusion.gate import Gate, fingerprint
from infusion.inject import remove
from infusion.methods.infusion import Infusion
from infusion.sampling.customised import Customised, check_covariance
from infusion.training.trainer import ConceptTrainer
from ldm.models.tokenizer import Tokenizer
from tests.infusion.conftest import WIDTH
from tests.infusion.sampling.test_customised import make_concept

CAPTIONS = [
    "a cat",
    "Two dogs, and a stuffed animal!",
    "an oil painting of the sea at night " * 12,  # longer than the tokenizer's 77 places
    "antidisestablishmentarianism",
    "a " * 9 + "red house",
] * 2
TEMPLATES = ["a photo of a {}", "the {}"]


def spd(width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    root = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT / width + 0.5 * torch.eye(width, dtype=torch.float64)


def write(path: Path, matrix: torch.Tensor, architecture: str = "tiny", **facts: object) -> Path:
    save_inverse(path, matrix, {"base_architecture": architecture, "base_sha256": "", **facts})
    return path


@pytest.mark.parametrize("pad", ["end", "zero"])
def test_words_lie_between_the_begin_and_the_end_token(pad):
    tokenizer = Tokenizer(context_length=8, pad=pad)
    texts = ["", "a cat", "a stuffed animal", "a b c d e f g h i"]
    words = word_tokens(tokenizer, tokenizer(texts))
    assert words.tolist() == [[False] + [True] * n + [False] * (7 - n) for n in (0, 2, 3, 6)]
    assert word_tokens(tokenizer, tokenizer(["! !"])).sum() == 2  # id 0, which OpenCLIP pads with, is a word too


@pytest.mark.parametrize("batch_size", [3, 100])
def test_streamed_is_the_closed_form(sd, batch_size):
    sd.text.double()
    rows = [
        encoding
        for caption in CAPTIONS
        for encoding in sd.text([caption])[0, 1 : 1 + min(75, len(sd.text.tokenizer.encode(caption)))]
    ]
    everything = torch.stack(rows)  # (n, D)
    covariance = estimate(sd.text, iter(CAPTIONS), batch_size=batch_size)
    assert (covariance.captions, covariance.tokens) == (len(CAPTIONS), len(rows)) == (10, 204)
    assert covariance.cut == 2
    assert covariance.matrix.dtype == torch.float64
    torch.testing.assert_close(covariance.matrix, everything.mT @ everything / len(rows), rtol=1e-12, atol=1e-12)


def test_too_few_tokens_are_refused(sd):
    with pytest.raises(ValueError, match=f"2 captions with 4 word tokens are too few: .* below {WIDTH} tokens"):
        estimate(sd.text, ["a cat", "a dog"])


def test_encodings_that_are_not_finite_are_refused(sd, monkeypatch):
    monkeypatch.setattr(sd.text, "encode_tokens", lambda ids: torch.full((*ids.shape, WIDTH), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        estimate(sd.text, CAPTIONS)


def test_the_ridge_is_a_share_of_the_mean_eigenvalue():
    matrix = spd(6)
    inverse, before, after = invert(matrix, 0.25)
    mean = matrix.trace() / 6
    expected = torch.linalg.inv(matrix + 0.25 * mean * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(inverse, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(invert(matrix)[0] @ matrix, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.equal(inverse, inverse.mT)
    assert before == pytest.approx(torch.linalg.cond(matrix).item(), rel=1e-9)
    assert after == pytest.approx(torch.linalg.cond(torch.linalg.inv(expected)).item(), rel=1e-9)
    assert after < before


def test_what_cannot_be_inverted_is_refused_with_the_ridge_that_helps():
    matrix = torch.diag(torch.tensor([0.0, 1, 2, 5], dtype=torch.float64))
    with pytest.raises(ValueError, match="condition number is inf.*a ridge of 3e-06 or more"):
        invert(matrix)
    inverse, before, after = invert(matrix, 3e-6)
    assert before == float("inf") and after < MOST
    assert inverse[3, 3].item() == pytest.approx(1 / (5 + 3e-6 * 2))
    alike = torch.ones(1024, 1024, dtype=torch.float64)
    assert invert(alike, 0.001)[1] == float("inf") > invert(alike, 0.001)[2]  # however bad it is
    for ridge in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ridge"):
            invert(matrix, ridge)


def test_round_trip(tmp_path):
    matrix = spd(5)
    path = write(tmp_path / "new" / "c.safetensors", matrix, "sd15", base_sha256="ab" * 32, tokens=9)
    read = InverseCovariance(path)
    assert torch.equal(read.matrix, matrix.float())
    assert (read.architecture, read.base_hash) == ("sd15", "ab" * 32)
    assert read.fingerprint == fingerprint(matrix)
    assert [file.name for file in path.parent.iterdir()] == ["c.safetensors"]
    identity = InverseCovariance()
    assert identity.matrix is None and identity.fingerprint == "identity"


ASYMMETRIC = torch.tensor([[2.0, 1.0], [0.5, 2.0]])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.ones(2, 3), r"\(2, 3\) of torch.float32 is no square matrix"),
        (torch.ones(4), "no square matrix"),
        (torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]), "not finite"),
        (ASYMMETRIC, "not finite, symmetric"),
        (-torch.eye(3), "positive definite"),
    ],
)
def test_unusable_matrices_are_refused(tmp_path, matrix, message):
    with pytest.raises(ValueError, match=f"c.safetensors: .*{message}"):
        InverseCovariance(write(tmp_path / "c.safetensors", matrix))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(ValueError, match="there is no such covariance file"):
        InverseCovariance(path)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="c.safetensors: not a file of tensors"):
        InverseCovariance(path)
    own = {"format": "infusion-covariance", "format_version": "1"}
    for name, said in (
        ("inverse_covariance", None),
        ("inverse_covariance", own | {"format_version": "2"}),
        ("other", own),
    ):
        save_file({name: torch.eye(2)}, path, said)
        with pytest.raises(ValueError, match="c.safetensors: no covariance file of version 1"):
            InverseCovariance(path)


def test_captions_are_lines_of_utf8(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("\ufeffa cat\n\n  ein Bär \r\n \t\nlast", encoding="utf-8")
    assert list(read_captions(path)) == ["a cat", "ein Bär", "last"]
    path.write_bytes("ein Bär\n".encode("latin-1"))
    with pytest.raises(ValueError, match="captions.txt: cannot be read as text: save it as UTF-8"):
        list(read_captions(path))
    with pytest.raises(ValueError, match="gone.txt: cannot be read"):
        list(read_captions(tmp_path / "gone.txt"))


@pytest.mark.parametrize("kind", ["sigmoid", "hard", "global"])
def test_the_identity_changes_no_gate_and_its_scale_none_either(kind):
    torch.manual_seed(0)
    encodings, target = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    mask, eye = torch.rand(2, 5) < 0.5, torch.eye(8, dtype=torch.float64)
    gate = Gate(kind)
    plain = gate(encodings, mask, target)
    torch.testing.assert_close(gate(encodings, mask, target, eye), plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(gate(encodings, mask, target, 7 * eye), plain, rtol=1e-12, atol=0)
    if kind != "hard":
        assert not torch.allclose(gate(encodings, mask, target, spd(8)), plain)


def gates_and_step(sd, covariance):
    module = ConceptTrainer(sd, Infusion(), "cat", TEMPLATES, covariance=covariance)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    optimizer = module.configure_optimizers()
    for index in range(2):
        module.training_step({"latents": latents, "template": TEMPLATES}, index).backward()
        optimizer.step()
    _, gates = module.encode(TEMPLATES)
    concept = module.concept()
    remove(sd.unet)
    return gates, concept


def test_training_with_an_identity_file_is_training_without(sd, tmp_path, monkeypatch):
    monkeypatch.setattr(ConceptTrainer, "log", lambda *args, **options: None)
    identity = InverseCovariance(write(tmp_path / "i.safetensors", torch.eye(WIDTH)))
    other = InverseCovariance(write(tmp_path / "c.safetensors", spd()))
    gates, concept = gates_and_step(sd, None)
    same_gates, same = gates_and_step(sd, identity)
    other_gates, different = gates_and_step(sd, other)
    assert torch.equal(gates, same_gates) and not torch.allclose(gates, other_gates, atol=1e-4)
    for name, residual in concept.tensors.items():
        assert torch.equal(residual, same.tensors[name]) and residual.any()
        assert not torch.equal(residual, different.tensors[name])
    assert concept.covariance == "identity"
    assert same.covariance == identity.fingerprint and different.covariance == other.fingerprint


def test_sampling_wants_the_covariance_of_training(sd):
    inverse = spd().float()
    concept = make_concept(sd, covariance=fingerprint(inverse))
    latents, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor(500)
    with Customised(sd, [concept], inverse_covariance=inverse) as customised:
        weighed = customised(["a {}"])(latents, time)
    with Customised(sd, [make_concept(sd)]) as customised:
        assert not torch.allclose(customised(["a {}"])(latents, time), weighed, atol=1e-4)
    with pytest.raises(ValueError, match="'cat' was trained with the covariance .*, and here is identity.*FILE"):
        Customised(sd, [concept])
    with pytest.raises(ValueError, match="its gate needs the same file"):
        check_covariance([concept], 2 * inverse)
    with pytest.raises(ValueError, match="'cat' was trained without a covariance"):
        check_covariance([make_concept(sd)], inverse)


def test_the_covariance_must_be_of_the_base(sd, tmp_path, recwarn):
    for name, matrix in (("sd15", spd()), ("tiny", spd(8))):
        other = InverseCovariance(write(tmp_path / f"{name}.safetensors", matrix, name))
        with pytest.raises(ValueError, match=f"{name}.safetensors: the covariance of '{name}', .* does not fit 'tiny'"):
            ConceptTrainer(sd, Infusion(), "cat", TEMPLATES, covariance=other)
    fits = InverseCovariance(write(tmp_path / "c.safetensors", spd(), base_sha256="ab" * 32))
    fits.check_base("tiny", "ab" * 32, WIDTH)
    fits.check_base("tiny", None, WIDTH)
    InverseCovariance().check_base("anything", "cd" * 32, 1)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="of another checkpoint of 'tiny'"):
        fits.check_base("tiny", "cd" * 32, WIDTH)
