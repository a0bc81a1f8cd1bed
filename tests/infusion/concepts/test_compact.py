import json
import math
import re
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from infusion.concepts import compact
from infusion.concepts.concept import Concept
from infusion.inject import cross_attention_layers
from infusion.sampling.sample import sample
from ldm.pipeline import StableDiffusion
from ldm.weights.checkpoint import sha256
from scripts import compare_forms
from scripts.compare_forms import psnr

ROOT = Path(__file__).parents[3]
PLACES = [
    *(f"input_blocks.{i}.1" for i in (1, 2, 4, 5, 7, 8)),
    "middle_block.1",
    *(f"output_blocks.{i}.1" for i in range(3, 12)),
]
WIDTHS = dict(zip(PLACES, [320] * 2 + [640] * 2 + [1280] * 6 + [640] * 3 + [320] * 3, strict=True))
TEMPLATES = (
    *(
        "a photo of a {}",
        "a photo of the {}",
        "a photo of one {}",
        "a close-up photo of a {}",
        "a good photo of the {}",
    ),
    *("a cropped photo of the {}", "a bright photo of a {}", "an image of a {}", "image of the {}"),
    *("a picture of the {}", "{}"),
)
METADATA = {"format": "infusion-concept", "format_version": "2", "form": "compact", "date": "2024-05-01"}
COARSEST = compact.STEPS[-1] / math.sqrt(12)  # relative error


def sd15(values, superclass="cat", **settings) -> Concept:
    """A concept of SD 1.5's size; `values` makes the numbers of a layer of some width."""
    tensors = {f"{place}.transformer_blocks.0.attn2": values(width) for place, width in WIDTHS.items()}
    hashes = {"base_hash": "0123456789abcdef" * 4, "covariance": "fedcba9876543210" * 4}
    settings = {"templates": TEMPLATES, "steps": 500, "learning_rate": 0.01} | hashes | settings
    return Concept(tensors, superclass, architecture="sd15", **settings)


def saved(concept: Concept, path: Path) -> Path:
    concept.save(path, "compact")
    return path


def gaussian(width: int) -> torch.Tensor:
    return 0.3 * torch.randn(width)


@pytest.fixture
def small() -> Concept:
    torch.manual_seed(0)
    tensors = {"a.attn2": torch.randn(24), "b.attn2": torch.zeros(8), "c.attn2": torch.randn(1, 16)}
    return Concept(tensors, "naïve cat", ("a photo of a {}",), "tiny", date="2024-05-01T12:00:00+00:00")


def random_concept(seed: int) -> Concept:
    """Layers of different kinds and scales, one of them heavy-tailed and one zero."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [
        lambda width: torch.randn(width, generator=generator),
        lambda width: torch.rand(width, generator=generator) - 0.5,
        lambda width: torch.rand(width, generator=generator).log() * (torch.randn(width, generator=generator).sign()),
        lambda width: torch.randn(width, generator=generator).sign(),
    ]
    scale, spread = (10 ** (6 * torch.rand(2, generator=generator) - 4)).tolist()
    odd = torch.randperm(16, generator=generator)[:2].tolist()
    index = iter(range(16))

    def values(width: int) -> torch.Tensor:
        place = next(index)
        if place in odd:
            return torch.empty(width).cauchy_(generator=generator) * scale if place == odd[0] else torch.zeros(width)
        kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
        return kind(width) * scale * (min(spread, 2) * torch.randn((), generator=generator)).exp()

    letters = torch.randint(97, 123, (1 + seed % 40,), generator=generator)
    return sd15(values, "".join(map(chr, letters)), seed=seed)


def check_random(seed: int, path: Path) -> None:
    concept = random_concept(seed)
    concept.save(path, "compact")
    loaded = Concept.load(path)
    assert path.stat().st_size <= 11_264
    assert loaded.relative_error(concept) <= 1.01 * COARSEST
    assert loaded.metadata() == concept.metadata()
    again = path.with_name("again.safetensors")
    loaded.save(again, "compact")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("seed", range(8))
def test_any_concept_of_sd15_fits(seed, tmp_path):
    check_random(seed, tmp_path / "c.safetensors")


@pytest.mark.slow
def test_two_hundred_concepts_of_sd15_fit(tmp_path):
    for seed in range(8, 208):
        check_random(seed, tmp_path / "c.safetensors")


def test_the_worst_case_is_as_good_as_documented(tmp_path):
    """Gaussian numbers of one scale have the highest entropy; the metadata are as long as they usually come."""
    torch.manual_seed(0)
    concept = sd15(gaussian, "w" * 40)
    path = saved(concept, tmp_path / "c.safetensors")
    assert concept.numbers == 12_480 and 11_000 < path.stat().st_size <= 11_264
    assert Concept.load(path).relative_error(concept) < 0.02


def test_a_concept_of_sdxl_has_as_many_bytes_a_number(tmp_path):
    torch.manual_seed(0)
    widths = [640] * 4 + [1280] * 60 + [640] * 6
    tensors = {f"blocks.{i}.transformer_blocks.{i % 10}.attn2": gaussian(width) for i, width in enumerate(widths)}
    concept = Concept(tensors, "cat", TEMPLATES, "sdxl", base_hash="0123456789abcdef" * 4)
    path = saved(concept, tmp_path / "c.safetensors")
    loaded = Concept.load(path)
    print(f"{path.stat().st_size:,} bytes, error {loaded.relative_error(concept):.2%}")
    assert concept.numbers == 83_200 and 74_000 < path.stat().st_size <= 83_200 * 11_264 // 12_480 == 75_093
    assert loaded.relative_error(concept) < 0.02 and loaded.metadata() == concept.metadata()
    with safe_open(path, "pt") as file:
        assert file.metadata()["format_version"] == "3"  # readers of before take 11,264 bytes for the limit
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base/infusion"


def test_few_numbers_are_as_good_as_it_gets(small, tmp_path):
    loaded = Concept.load(saved(small, tmp_path / "c.safetensors"))
    assert loaded.relative_error(small) < 1.1 * compact.STEPS[0] / math.sqrt(12)
    assert loaded.tensors["c.attn2"].shape == (1, 16) and not loaded.tensors["b.attn2"].any()
    assert loaded.metadata() == small.metadata()


@pytest.mark.parametrize("step", [0.03125, 3e-7, 1.0, 40.0])
def test_multiples_of_a_step_are_kept_bit_for_bit(step):
    torch.manual_seed(0)
    step = torch.tensor(step).half().float()  # few digits, so that multiples are exact
    tensors = {"a": torch.randint(-300, 300, (200,)) * step, "b": torch.randint(-3, 3, (50,)) * 7 * step}
    decoded = compact.decode(load(compact.encode(tensors, METADATA)), METADATA)
    assert all(torch.equal(decoded[name], tensors[name]) for name in tensors)


def test_every_layer_has_the_same_error():
    """For a number of bits, the sum of squares is smallest where no layer is finer than another."""
    torch.manual_seed(0)
    tensors = {"large": 5 * torch.randn(4000), "small": 0.5 * torch.randn(4000)}
    decoded = compact.decode(load(compact.encode(tensors, METADATA)), METADATA)
    errors = [(decoded[name] - tensors[name]).square().mean().item() for name in tensors]
    assert errors[0] == pytest.approx(errors[1], rel=0.1) and errors[0] > 0


def test_what_does_not_fit_is_refused(tmp_path):
    torch.manual_seed(0)
    long = sd15(gaussian, templates=tuple(f"a photo of a {{}} number {i}" for i in range(90)))
    huge = Concept({f"{i}.attn2": gaussian(1001) for i in range(100)}, "cat", TEMPLATES, "sd15")
    for concept, message in ((long, "templates"), (huge, "100,100 numbers")):
        with pytest.raises(ValueError, match=message):
            concept.save(tmp_path / "c.safetensors", "compact")
        assert not list(tmp_path.iterdir())


def test_the_reader_in_the_documentation_reads_it(tmp_path):
    torch.manual_seed(0)
    path = saved(sd15(gaussian, "stuffed animal"), tmp_path / "c.safetensors")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "concept-file.md").read_text("utf-8"), re.DOTALL)
    scope = {}
    exec(code, scope)  # noqa: S102
    metadata, tensors = scope["read_compact"](path)
    loaded = Concept.load(path)
    assert metadata["superclass"] == "stuffed animal" and list(tensors) == list(loaded.tensors)
    assert all(tensors[name] == loaded.tensors[name].tolist() for name in tensors)


@pytest.mark.parametrize("bits, every", [(0x01, 1), (0x20, 5), (0xFF, 7)])
def test_every_damaged_byte_is_noticed(small, tmp_path, bits, every):
    path = saved(small, tmp_path / "c.safetensors")
    whole = path.read_bytes()
    for i in range(0, len(whole), every):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ bits]) + whole[i + 1 :])
        with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
            Concept.load(path)


def test_every_truncation_is_noticed(small, tmp_path):
    path = saved(small, tmp_path / "c.safetensors")
    whole = path.read_bytes()
    for i in (*range(16), *range(16, len(whole), 9), len(whole) - 1):
        path.write_bytes(whole[:i])
        with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
            Concept.load(path)
    path.write_bytes(whole + bytes(11_264))
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
        Concept.load(path)


def streams(layers: object, content: bytes = b"", **changes: object) -> dict[str, torch.Tensor]:
    """A compact file's tensors that hold what they should not, with the checksum right."""
    said = {"step": 0.5, "crc32": compact.checksum(METADATA, content), "layers": layers} | changes
    parts = {"layers": zlib.compress(json.dumps(said).encode()), "numbers": content}
    return {name: compact._bytes(part) for name, part in parts.items()}


def test_streams_without_a_lie_are_read():
    content = compact.pack([1, -1], compact.weights(1, 2))
    decoded = compact.decode(streams({"a": [[3], 0, 1, 0], "b": [[2], 1, 2, len(content)]}, content), METADATA)
    assert decoded["a"].tolist() == [0, 0, 0] and decoded["b"].tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"layers": {"a": [[10**4, 10**4], 0, 1, 0]}}, "out of range"),
        ({"layers": {"a": [[10**12, 0], 0, 1, 0]}}, "out of range"),
        ({"layers": {"a": [[1] * 70, 0, 1, 0]}}, "out of range"),
        ({"layers": {"a": [[-1], 0, 1, 0]}}, "out of range"),
        ({"layers": {"a": [[1], 10**6, 1, 0]}}, "out of range"),
        ({"layers": {"a": [[1], 0, 0, 0]}}, "out of range"),
        ({"layers": {"a": [[1], 0, 1, 5]}}, "out of range"),
        ({"layers": {}, "content": b"x"}, "lengths"),
        ({"layers": {"a": [[2], 1, 1, 1]}, "content": b"\xff"}, "more than its numbers"),
        ({"layers": {"a": [[1.5], 0, 1, 0]}}, "damaged"),
        ({"layers": {"a": ["xy", 0, 1, 0]}}, "damaged"),
        ({"layers": {"a": 3}}, "damaged"),
        ({"layers": [1]}, "damaged"),
        ({"layers": {}, "step": math.nan}, "above 0"),
        ({"layers": {}, "step": "1"}, "damaged"),
        ({"layers": {"a": [[1], 0, 1, 0]}, "crc32": 5}, "checksum"),
    ],
)
def test_lies_are_refused(lie, message):
    with pytest.raises(ValueError, match=message):
        compact.decode(streams(**lie), METADATA)


def test_other_tensors_are_refused():
    honest = streams({"a": [[3], 0, 1, 0]})
    for wrong in (
        {"layers": honest["layers"]},
        honest | {"more": honest["layers"]},
        honest | {"numbers": torch.zeros(0)},
    ):
        with pytest.raises(ValueError, match="two tensors"):
            compact.decode(wrong, METADATA)


def test_the_forms_are_compared_by_their_samples(tiny, tmp_path, capsys):
    torch.manual_seed(0)
    layers = cross_attention_layers(StableDiffusion.from_config(tiny).unet)
    tensors = {name: torch.randn(layer.heads * layer.dim_head) for name, layer in layers.items()}
    path = tmp_path / "c.safetensors"
    Concept(tensors, "cat", ("a photo of a {}",), "tiny", sha256(tiny.with_suffix(".safetensors"))).save(path)
    compare_forms.main(["--config", str(tiny), "--concept", str(path), "--steps", "2", "--n_samples", "2"])
    found = json.loads(capsys.readouterr().out)
    full, half, compacted = (found["forms"][form] for form in ("full", "half", "compact"))
    assert found["seeds"] == [0, 1] and found["numbers"] == sum(tensor.numel() for tensor in tensors.values())
    assert full == {"bytes": path.stat().st_size, "relative_error": 0.0}
    assert 0 < half["relative_error"] < 1e-3 < compacted["relative_error"] < 0.01
    assert compacted["bytes"] < half["bytes"] < full["bytes"]
    assert 40 < compacted["worst_psnr"] == min(compacted["psnr"]) and len(compacted["psnr"]) == 2


def test_psnr_is_that_of_each_image():
    reference = torch.rand(2, 3, 8, 8) / 2
    images = reference + torch.tensor([0.1, 0.01]).reshape(2, 1, 1, 1)
    assert psnr(images, reference) == pytest.approx([20, 40], abs=1e-3)


@pytest.mark.slow
def test_samples_of_sd15_hardly_differ_from_the_full_forms(random_checkpoint, configs, tmp_path):
    sd = StableDiffusion.from_checkpoint(configs / "sd15.yaml", random_checkpoint("sd15"))
    torch.manual_seed(0)
    # residuals of 0.3 beside values of about 1, and 77 times as much, for random attention is spread over all tokens
    concept = sd15(lambda width: 77 * gaussian(width), base_hash=sd.hash, covariance="identity")
    path = saved(concept, tmp_path / "c.safetensors")
    assert path.stat().st_size <= 11_264

    def draw(*concepts: Concept) -> torch.Tensor:
        prompt = "a photo of a {}" if concepts else "a photo of a cat"
        return sample(sd, [prompt], concepts, steps=3, scale=7.5, seed=0, height=64, width=64)

    full = draw(concept)
    (difference,), (compacted,) = psnr(draw(), full), psnr(draw(Concept.load(path)), full)
    error = Concept.load(path).relative_error(concept)
    print(f"{path.stat().st_size} bytes, {error:.2%}, {compacted:.1f} dB; without the concept {difference:.1f} dB")
    assert difference < 30 and compacted >= 40
