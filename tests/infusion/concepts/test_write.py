import copy
import hashlib
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from infusion.concepts import write
from infusion.concepts.concept import Concept
from infusion.methods import find_method
from infusion.tokens import Word
from tests.infusion.concepts.conftest import NODES, SINGLE

pytestmark = pytest.mark.filterwarnings("ignore:the concept 'dog' was trained on another checkpoint")

TEMPLATES = ("a photo of a {}", "the {}")
PROMPT = "a photo of a {} on a hill"


@pytest.fixture
def learned(models):
    """A concept as a method of ours starts it, with random numbers added."""

    def make(name: str, method: str, **options: object) -> Concept:
        made, word = find_method(method)(**options), Word("dog", TEMPLATES)
        start = made.start(models[name], word)
        torch.manual_seed(0)
        tensors = {key: t.detach() + 0.2 * torch.randn(t.shape) for key, t in start.items()}
        facts = dict(method=method, attention=made.attention, options=made.options, noun=made.noun("dog"))
        return Concept(tensors, "dog", TEMPLATES, name, "ab" * 32, steps=400, learning_rate=1e-4, seed=7, **facts)

    return make


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", NODES)
def test_a_lora_opens_in_diffusers_and_here(known, learned, ours, theirs, pipeline, agree, tmp_path, name, layout):
    concept, path = learned(name, "lora", rank=4, alpha=6.0), tmp_path / "a.safetensors"
    write.write(concept, path, layout, {})
    pipe = pipeline(name)
    pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
    image = ours(name, [concept], PROMPT)
    agree(name, image, theirs(pipe, name, PROMPT.replace("{}", "sks dog")), PROMPT)
    again = Concept.load(path)
    assert (ours(name, [again], PROMPT) - image).abs().max() <= 2e-4
    same = {**concept.metadata(), "options": ""}
    assert {**again.metadata(), "options": ""} == same
    if layout == "kohya":
        assert again.tensors.keys() == concept.tensors.keys() and again.options["alpha"] == 6.0
        assert all(torch.equal(again.tensors[key], tensor) for key, tensor in concept.tensors.items())


def test_changes_of_the_text_encoder_and_of_convolutions_make_the_round_trip(known, models, ours, tmp_path):
    """Of SD 2's text encoder queries, keys and values are one tensor here and three there."""
    torch.manual_seed(0)
    state = {
        **models["tiny2"].unet.state_dict(),
        **{f"text.{n}": t for n, t in models["tiny2"].text.state_dict().items()},
    }
    names = ("text.model.transformer.resblocks.1.attn.in_proj_weight", "middle_block.0.in_layers.2.weight")
    tensors = {}
    for name in names:
        out, *inner = state[name].shape
        tensors |= {f"{name}.down": torch.randn(2, *inner), f"{name}.up": torch.randn(out, 2)}
    tensors["middle_block.0.in_layers.2.bias"] = torch.randn(64)
    facts = dict(method="lora", attention="own", options={"rank": 2, "alpha": 2.0, "identifier": ""})
    concept = Concept(tensors, "dog", TEMPLATES, "tiny2", **facts)
    write.write(concept, tmp_path / "a.safetensors", "kohya", {})
    again = Concept.load(tmp_path / "a.safetensors")
    assert (ours("tiny2", [again], PROMPT) - ours("tiny2", [concept], PROMPT)).abs().max() <= 2e-4
    assert (ours("tiny2", [again], PROMPT) - ours("tiny2", [], "a photo of a dog on a hill")).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"in_layers\.2\.bias is not of low rank"):
        write.write(concept, tmp_path / "b.safetensors", "diffusers", {})


@pytest.mark.parametrize("layout", ["a1111", "diffusers"])
def test_a_learned_word_opens_in_diffusers_and_here(known, learned, ours, theirs, pipeline, agree, tmp_path, layout):
    for name in NODES:
        concept, path = learned(name, "textual_inversion"), tmp_path / f"{name}.safetensors"
        write.write(concept, path, layout, {})
        pipe = pipeline(name)
        if name in SINGLE:
            pipe.load_textual_inversion(str(path), token="<dog>")
        else:
            words = load_file(path)
            for part, end in (("clip_l", ""), ("clip_g", "_2")):
                text, tokens = getattr(pipe, f"text_encoder{end}"), getattr(pipe, f"tokenizer{end}")
                pipe.load_textual_inversion(words[part], token="<dog>", text_encoder=text, tokenizer=tokens)
        reference = theirs(pipe, name, PROMPT.replace("{}", "<dog>"))
        assert (ours(name, [concept], PROMPT) - reference).abs().max() <= 2e-4
        again = Concept.load(path)
        assert torch.equal(again.tensors["tokens"], concept.tensors["tokens"])
        assert (ours(name, [again], PROMPT) - reference).abs().max() <= 2e-4


def test_custom_diffusion_opens_in_diffusers_and_here(known, models, learned, ours, theirs, pipeline, agree, tmp_path):
    for name in SINGLE:
        concept, folder = learned(name, "custom_diffusion"), tmp_path / name
        write.write(concept, folder, "diffusers", {}, copy.deepcopy(models[name]))
        pipe = pipeline(name)
        pipe.unet.load_attn_procs(folder, weight_name=write.WEIGHTS, _pipeline=pipe)
        pipe.load_textual_inversion(str(folder), weight_name="<new1>.bin")
        image = ours(name, [concept], PROMPT)
        agree(name, image, theirs(pipe, name, PROMPT.replace("{}", "<new1> dog")), PROMPT)
        again = Concept.load(folder, superclass="dog")
        assert (ours(name, [again], PROMPT) - image).abs().max() <= 2e-4


@pytest.mark.parametrize("layout", ["folder", "checkpoint"])
@pytest.mark.parametrize("method", ["dreambooth", "lora"])
@pytest.mark.parametrize("name", ["tiny", "tinyxl"])
def test_whole_models(known, models, learned, ours, exported, theirs, agree, tmp_path, name, method, layout):
    concept, path = learned(name, method), tmp_path / f"a{'' if layout == 'folder' else '.safetensors'}"
    if method == "dreambooth":
        concept = replace(concept, tensors={key: 0.2 * tensor for key, tensor in concept.tensors.items()})
    write.write(concept, path, layout, {}, copy.deepcopy(models[name]))
    image, prompt = ours(name, [concept], PROMPT), PROMPT.replace("{}", "sks dog")
    assert (ours(name, [Concept.load(path)], prompt) - image).abs().max() <= 2e-4
    if layout == "folder":
        pipe = DiffusionPipeline.from_pretrained(path, local_files_only=True)
    else:
        kind = {"tiny": StableDiffusionPipeline, "tinyxl": StableDiffusionXLPipeline}[name]
        pipe = kind.from_single_file(path, config=str(exported[name]), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    agree(name, image, theirs(pipe, name, prompt), PROMPT)


def test_what_has_no_equal_is_said(known, learned):
    for method, layout, says in (
        ("infusion", "kohya", "no exact equal"),
        ("perfusion", "diffusers", "no exact equal"),
        ("p_plus", "a1111", "what p_plus learned of tiny has no exact equal"),
        ("custom_diffusion", "kohya", "no exact equal in the layout kohya; it has in diffusers"),
        ("textual_inversion", "checkpoint", "no exact equal in the layout checkpoint"),
    ):
        with pytest.raises(ValueError, match=says):
            write.check_layout(learned("tiny", method), layout)
    with pytest.raises(
        ValueError, match="of tinyxl has no exact equal"
    ):  # diffusers' file has one word, SDXL two encoders
        write.check_layout(learned("tinyxl", "custom_diffusion"), "diffusers")


def test_metadata_for_others(known, learned, tmp_path):
    concept, path = learned("tiny", "lora"), tmp_path / "a.safetensors"
    said = {"author": "me", "license": "MIT", "tags": "dog, pet", "description": "A dog.", "thumbnail": "data:x"}
    write.write(concept, path, "kohya", said)
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    with safe_open(path, "pt") as file:
        found = file.metadata()
        assert {name.split(".")[-1] for name in file.keys()} == {"weight", "alpha"}  # noqa: SIM118
        assert all(name.startswith("lora_unet_") for name in file.keys())  # noqa: SIM118
    assert {name: found[f"modelspec.{name}"] for name in said} == said
    assert found["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
    assert found["modelspec.resolution"] == "16x16" and found["modelspec.prediction_type"] == "epsilon"
    assert found["modelspec.trigger_phrase"] == "sks dog" and "sks dog" in found["modelspec.usage_hint"]
    assert (found["ss_network_dim"], found["ss_network_alpha"], found["ss_steps"]) == ("4", "4.0", "400")
    text = write.card(concept, said)
    assert (
        text.startswith('---\nlicense: "MIT"\ntags: ["dog", "pet"]\ninstance_prompt: "sks dog"\n') and "A dog." in text
    )
    assert (
        write.default_name(replace(concept, superclass="stuffed animal/x")) == "stuffed_animal_x-lora-400.safetensors"
    )
