import base64
import io
import pickle

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from infusion.concepts.concept import Concept
from infusion.inject import cross_attention_layers
from ldm.util.config import instantiate
from ldm.weights.recognise import backbones
from scripts.convert_concept import main


@pytest.fixture(scope="module")
def widths() -> dict[str, int]:
    """Layer of SD 1.5 -> width."""
    with torch.device("meta"):
        unet = instantiate(backbones()["sd15"], "sd").unet
    return {name: layer.heads * layer.dim_head for name, layer in cross_attention_layers(unet).items()}


@pytest.fixture
def concept(widths) -> Concept:
    torch.manual_seed(0)
    tensors = {name: 0.3 * torch.randn(width) for name, width in widths.items()}
    return Concept(tensors, "cat", ("a photo of a {}", "{}"), "sd15", "ab" * 32, steps=500)


@pytest.fixture
def fails(capsys):
    """Runs the command, which must complain in one line with exit code 2; returns the line."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith("error: ")
        return line

    return run


def released(widths: dict[str, int], keys: float | None = None, text: int = 768) -> dict:
    """What the released code saves: a value of 1, 2, 3 … for each layer."""
    prefix = "to_v.target_output"
    learned = {f"{name}.{prefix}": torch.full((width,), i + 1.0) for i, (name, width) in enumerate(widths.items())}
    if keys is not None:
        learned |= {f"{name}.to_k.target_output": torch.full((width,), keys) for name, width in widths.items()}
    words = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(1, text))})
    return {
        "global_step": 500,
        "C_inv": torch.eye(4),
        "target_input": torch.ones(text),
        "embedding": {"initializer_words": ["cat"], "string_to_token": {"*": 9}, "string_to_param": words},
        "target_output": learned,
    }


def test_forms_and_back(concept, tmp_path, capsys):
    full, half, compact, again = (tmp_path / f"{name}.safetensors" for name in ("full", "half", "compact", "again"))
    concept.save(full)
    for arguments in ([full, half, "--form", "half"], [half, compact, "--form", "compact"], [compact, again]):
        main([str(argument) for argument in arguments])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{half}: half, {half.stat().st_size:,} bytes, 12,480 numbers, relative error ")
    assert 1e-5 < float(lines[0].rsplit(" ", 1)[1]) < 1e-3 < float(lines[1].rsplit(" ", 1)[1]) < 0.02
    assert lines[2].endswith(f"full, {again.stat().st_size:,} bytes, 12,480 numbers, relative error 0.0e+00")
    assert compact.stat().st_size <= 11_264 < half.stat().st_size < full.stat().st_size
    assert Concept.load(compact).metadata() == concept.metadata()
    other = tmp_path / "other.safetensors"
    main([str(again), str(other), "--form", "compact"])
    assert other.read_bytes() == compact.read_bytes()


def test_nothing_is_overwritten(concept, tmp_path, fails):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    concept.save(source)
    before = source.read_bytes()
    target.write_text("mine")
    assert "is there already" in fails(source, target)
    assert "is there already" in fails(source, source, "--form", "compact")
    assert "is there already" in fails(source, tmp_path / "b.safetensors", "--form", "half")
    assert target.read_text() == "mine" and source.read_bytes() == before
    assert str(target) in fails(source, target / "c.safetensors")
    assert ".safetensors" in fails(source, tmp_path / "c.ckpt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_what_it_cannot_convert(concept, tmp_path, fails):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    concept.save(source)
    assert str(tmp_path / "none") in fails(tmp_path / "none", target)
    assert "its superclass" in fails(source, target, "--superclass", "dog")
    assert "--form" in fails(source, target, "--form", "tiny")
    source.write_bytes(source.read_bytes()[:-1])
    assert str(source) in fails(source, target)
    assert not target.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("layout", ["target_output", "state_dict", "flat"])
def test_a_concept_of_the_released_code(widths, tmp_path, layout, legacy):
    content = released(widths)
    if layout != "target_output":
        flat = {f"model.diffusion_model.{name}": tensor[None] for name, tensor in content["target_output"].items()}
        flat["target_input"] = content["target_input"]
        content = {"state_dict": flat, "global_step": 500} if layout == "state_dict" else flat
    if legacy:
        content.pop("embedding", None)  # older torch writes the source code of modules beside them
    source, target = tmp_path / "a.ckpt", tmp_path / "a.safetensors"
    torch.save(content, source, _use_new_zipfile_serialization=not legacy)
    main([str(source), str(target), "--superclass", "stuffed animal"])
    concept = Concept.load(target)
    assert list(concept.tensors) == list(widths) and concept.numbers == 12_480
    for i, (name, width) in enumerate(widths.items()):
        assert torch.equal(concept.tensors[name], torch.full((width,), i + 1.0))
    assert (concept.superclass, concept.architecture, concept.base_hash) == ("stuffed animal", "sd15", None)
    assert (concept.gate.kind, concept.attention, concept.covariance) == ("hard", "own", "identity")
    assert concept.steps == (0 if layout == "flat" else 500) and concept.templates == ("a photo of a {}",)


def test_flags_say_what_a_released_file_does_not(widths, tmp_path):
    torch.save(released(widths, text=1024), tmp_path / "a.ckpt")
    paths = [str(tmp_path / "a.ckpt"), str(tmp_path / "a.safetensors")]
    flags = "--superclass cat --gate sigmoid --attention foundation --architecture sd21_768 --form compact"
    main([*paths, *flags.split(), "--templates", "a {}", "the {}"])
    concept = Concept.load(paths[1])
    assert (concept.gate.kind, concept.attention, concept.architecture) == ("sigmoid", "foundation", "sd21_768")
    assert concept.templates == ("a {}", "the {}")
    main([paths[0], str(tmp_path / "b.safetensors"), "--superclass", "cat"])
    assert Concept.load(tmp_path / "b.safetensors").architecture == "sd21"


def test_residual_keys_are_kept_unless_asked(widths, tmp_path, fails, capsys):
    source, target = tmp_path / "a.ckpt", tmp_path / "a.safetensors"
    torch.save(released(widths, keys=2.5), source)
    main([str(source), str(target), "--superclass", "cat"])
    kept = Concept.load(target)
    assert list(kept.tensors) == [*widths, *(f"{name}.key" for name in widths)] and kept.attention == "own"
    assert all(kept.tensors[f"{name}.key"].eq(2.5).all() for name in widths) and kept.numbers == 24960
    assert "--values_only" in fails(
        source, tmp_path / "b.safetensors", "--superclass", "cat", "--attention", "foundation"
    )
    assert not (tmp_path / "b.safetensors").exists()
    capsys.readouterr()
    main([str(source), str(tmp_path / "b.safetensors"), "--superclass", "cat", "--values_only"])
    assert "are left out" in capsys.readouterr().out
    assert list(Concept.load(tmp_path / "b.safetensors").tensors) == list(widths)
    torch.save(released(widths, keys=0.0), source)  # never trained
    main([str(source), str(tmp_path / "c.safetensors"), "--superclass", "cat"])
    assert list(Concept.load(tmp_path / "c.safetensors").tensors) == list(widths)


class Evil:
    def __reduce__(self):
        return eval, ("1",)


def test_released_files_that_are_refused(widths, tmp_path, fails):
    source, target = tmp_path / "a.ckpt", tmp_path / "a.safetensors"
    good = released(widths)
    first = f"{next(iter(widths))}.to_v.target_output"

    def learned(**changes: object) -> dict:
        return good | {"target_output": good["target_output"] | changes}

    cases = [
        (good | {"evil": Evil()}, "builtins.eval"),
        (learned(evil=Evil()), "builtins.eval"),
        ({"target_output": good["target_output"]}, "--architecture"),
        (good | {"target_input": torch.tensor(1.0)}, "--architecture"),
        ({"target_output": {}, "target_input": torch.ones(768)}, "no concept of the released code"),
        (good | {"target_output": Concept}, "no concept of the released code"),
        (learned(**{first: torch.ones(5)}), "320 wide"),
        (learned(**{first: torch.ones(1).expand(2**40)}), "320 wide"),
        (learned(**{first: torch.full((320,), float("nan"))}), "not finite"),
        (learned(**{"other.to_v.target_output": torch.ones(320)}), "no cross-attention layer 'other'"),
    ]
    for content, message in cases:
        torch.save(content, source)
        line = fails(source, target, "--superclass", "cat")
        assert message in line and str(source) in line
    torch.save(good, source)
    assert "--superclass" in fails(source, target)
    for content in (b"", pickle.dumps(Evil()), source.read_bytes()[:-2000]):
        source.write_bytes(content)
        assert str(source) in fails(source, target, "--superclass", "cat")
    assert not target.exists()


def lora(path, **said: str) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    torch.manual_seed(0)
    tensors = {f"{name}.lora_down.weight": torch.randn(4, 768), f"{name}.lora_up.weight": torch.randn(1280, 4)}
    save_file({**tensors, f"{name}.alpha": torch.tensor(2.0)}, path, said)


def test_another_tools_file_becomes_a_concept_and_goes_back(tmp_path, capsys):
    source, ours = tmp_path / "style.safetensors", tmp_path / "ours.safetensors"
    lora(source, **{"modelspec.author": "me"})
    main([str(source), str(ours), "--superclass", "dog", "--noun", "sks dog"])
    concept = Concept.load(ours)
    assert (concept.superclass, concept.noun, concept.method) == ("dog", "sks dog", "lora")
    main([str(ours), "--to", "kohya", "--license", "MIT", "--card"])
    back = tmp_path / "dog-lora-0.safetensors"
    assert capsys.readouterr().out.splitlines()[1].startswith(f"{back}: kohya, full, ")
    theirs = load_file(source)
    assert load_file(back).keys() == theirs.keys()
    assert all(torch.equal(load_file(back)[name], tensor) for name, tensor in theirs.items())
    with safe_open(back, "pt") as file:
        said = file.metadata()
    assert (said["modelspec.author"], said["modelspec.license"]) == ("me", "MIT")
    assert 'license: "MIT"' in back.with_suffix(".md").read_text()
    again = Concept.load(back)
    assert again.metadata() == concept.metadata() and again.tensors.keys() == concept.tensors.keys()


def test_a_thumbnail_is_made_small(tmp_path, fails):
    lora(tmp_path / "a.safetensors")
    Image.new("RGB", (900, 600), "red").save(tmp_path / "a.png")
    main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--thumbnail", str(tmp_path / "a.png")])
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        said = file.metadata()["modelspec.thumbnail"]
    kind, _, data = said.partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 171)
    assert "--thumbnail" in fails(tmp_path / "a.safetensors", tmp_path / "c", "--thumbnail", tmp_path / "b.safetensors")


def test_what_has_no_equal_elsewhere_is_one_line(concept, tmp_path, fails):
    source = tmp_path / "a.safetensors"
    concept.save(source)
    assert "no exact equal in files of other tools (docs/files.md" in fails(source, "--to", "kohya")
    lora(tmp_path / "b.safetensors")
    assert "--gate" in fails(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--gate", "hard")
    assert "--form" in fails(
        tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--to", "kohya", "--form", "compact"
    )
    assert "--ckpt" in fails(tmp_path / "b.safetensors", tmp_path / "c", "--to", "folder", "--ckpt", tmp_path / "none")
    assert "is there already" in fails(source, source)
