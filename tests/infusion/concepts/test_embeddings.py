import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from infusion.concepts.concept import Concept
from tests.infusion.concepts.conftest import WIDTH

PROMPT = "a photo of a {} on a hill"


def a1111(path, vectors):
    words = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "tower", "step": 99}
    torch.save(words | {"sd_checkpoint": "ab", "sd_checkpoint_name": "sd"}, path)


MAKERS = {  # ending -> how it is written
    "a1111.pt": a1111,
    "a1111.safetensors": lambda path, vectors: save_file({"emb_params": vectors}, path),
    "diffusers.bin": lambda path, vectors: torch.save({"<tower>": vectors}, path),
    "diffusers.safetensors": lambda path, vectors: save_file({"<tower>": vectors}, path),
}


@pytest.mark.parametrize("file", MAKERS)
def test_the_images_are_those_of_diffusers(known, ours, theirs, pipeline, agree, tmp_path, file):
    torch.manual_seed(0)
    for name, vectors in (("tiny", torch.randn(3, WIDTH["tiny"])), ("tiny2", torch.randn(1, WIDTH["tiny2"]))):
        path = tmp_path / f"{name}-{file}"
        MAKERS[file](path, vectors)
        concept = Concept.load(path)
        assert concept.method == "textual_inversion" and concept.architecture == name
        pipe = pipeline(name)
        pipe.load_textual_inversion(str(path), token="<x>")
        reference = theirs(pipe, name, PROMPT.replace("{}", "<x>"))
        agree(name, ours(name, [concept], PROMPT), reference, PROMPT)


def test_one_vector_may_lack_its_row(known, tmp_path):
    save_file({"<tower>": torch.arange(32.0)}, tmp_path / "a.safetensors")
    concept = Concept.load(tmp_path / "a.safetensors")
    assert concept.tensors["tokens"].shape == (1, 32) and concept.superclass == "tower" and concept.noun == "*"


def test_what_the_file_says_of_itself(known, tmp_path):
    a1111(tmp_path / "other.pt", torch.ones(2, 32))
    concept = Concept.load(tmp_path / "other.pt", superclass="building")
    assert concept.superclass == "building" and concept.noun == "* *"
    assert Concept.load(tmp_path / "other.pt").superclass == "tower"


def test_an_old_file_with_a_dict_of_parameters(known, tmp_path):
    a1111(tmp_path / "a.pt", torch.ones(2, 32))
    content = torch.load(tmp_path / "a.pt")
    content["string_to_param"] = nn.ParameterDict({"*": nn.Parameter(torch.full((2, 32), 3.0))})
    torch.save(content, tmp_path / "a.pt")
    assert torch.equal(Concept.load(tmp_path / "a.pt").tensors["tokens"], torch.full((2, 32), 3.0))


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"), ("emb", "emb2")])
def test_both_encoders_vectors_lie_side_by_side(monkeypatch, tmp_path, names):
    node = {"params": {"unet": {"params": {"context_dim": 2048, "model_channels": 320}}}}
    monkeypatch.setattr("ldm.weights.recognise.backbones", lambda: {"sdxl": node})
    first, second = torch.randn(2, 768), torch.randn(2, 1280)
    save_file(dict(zip(names, (first, second), strict=True)), tmp_path / "a.safetensors")
    concept = Concept.load(tmp_path / "a.safetensors")
    assert concept.architecture == "sdxl" and torch.equal(concept.tensors["tokens"], torch.cat([first, second], 1))
    save_file({"<a>": first}, tmp_path / "learned_embeds.safetensors")
    save_file({"<a>": second}, tmp_path / "learned_embeds_2.safetensors")
    assert torch.equal(Concept.load(tmp_path).tensors["tokens"], torch.cat([first, second], 1))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"emb_params": torch.ones(2, 31)}, "31 wide"),
        ({"emb_params": torch.ones(2, 2, 32)}, "vectors"),
        ({"emb_params": torch.full((2, 32), torch.nan)}, "not finite"),
        ({"emb_params": torch.ones(80, 32)}, "no learned word"),
        ({"<a>": torch.ones(32), "<b>": torch.ones(48)}, "no learned word"),
        ({"emb_params": torch.ones(2, 32), "more": torch.ones(2, 32)}, "this file has 2"),
        ({"clip_l": torch.ones(2, 768)}, "clip_g"),
        ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(3, 1280)}, "vectors"),
    ],
)
def test_what_is_no_learned_word_is_refused(known, tmp_path, tensors, says):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=says) as error:
        Concept.load(path)
    assert str(error.value).startswith(str(path))
