"""The nodes for ComfyUI, in a stand-in for it: our own sampler's predictions, and the base model without a concept."""

import importlib
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from infusion.concepts.concept import Concept
from infusion.gate import Gate
from infusion.inject import cross_attention_layers
from infusion.sampling.customised import Customised
from infusion.sampling.settings import Settings
from ldm.models.attention import Context
from tests.infusion.export import comfy
from tests.infusion.export.conftest import tiny

X, STEP = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 500
FOLDER = Path(__file__).parents[3] / "infusion" / "export" / "comfyui"


@pytest.fixture(scope="module")
def sd():
    return tiny("sd15", words=None)


@pytest.fixture(scope="module")
def folder(sd, tmp_path_factory):
    """Concepts of one and two tokens, in every form, and one that the nodes do not take."""
    folder = tmp_path_factory.mktemp("models")
    widths = {name: layer.heads * layer.dim_head for name, layer in cross_attention_layers(sd.unet).items()}
    for seed, (noun, form) in enumerate((("cat", "full"), ("stuffed animal", "compact"), ("orange", "half"))):
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: 5 * torch.randn(width, generator=generator) for name, width in widths.items()}
        concept = Concept(tensors, noun, ("a photo of a {}", "the {}", "{}"), "tiny", gate=Gate("sigmoid"))
        concept.save(folder / "infusion" / f"{noun}.safetensors", form)
    Concept(tensors, "cat", ("{}",), "tiny", method="perfusion").save(folder / "infusion" / "perfusion.safetensors")
    Concept(tensors, "cat", ("{}",), "sd15").save(folder / "infusion" / "sd15.safetensors")
    wide = {next(iter(tensors)): torch.ones(48)}
    Concept(wide, "cat", ("{}",), "tiny").save(folder / "infusion" / "wide.safetensors")
    return folder


@pytest.fixture
def nodes(folder, monkeypatch):
    for name, module in comfy.comfy_modules(folder).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "infusion.export.comfyui", raising=False)
    yield importlib.import_module("infusion.export.comfyui")
    del sys.modules["infusion.export.comfyui"]


@pytest.fixture
def patcher():
    """A model of its own: ComfyUI's has other cross-attentions."""
    return comfy.Patcher(comfy.Base(tiny("sd15", words=None).unet))


def run(node, **inputs):
    (out, *_), _ = node.execute(**inputs)
    return out


def load(nodes, noun="cat", token="<rex>", **values):
    given = dict(concept=f"{noun}.safetensors", token=token, strength=1.0, beta=0.7, tau=0.15, gate="as trained")
    return run(nodes.LoadInfusionConcept, **given | values)


def ours(sd, folder, prompts, nouns=("cat",), **settings) -> Tensor:
    """Our sampler's prediction."""
    concepts = [Concept.load(folder / "infusion" / f"{noun}.safetensors") for noun in nouns]
    with Customised(sd, concepts, Settings(scale=1.0, **settings)) as model:
        return model(prompts)(X, torch.tensor(STEP))


def plain(sd, text: Tensor) -> Tensor:
    with torch.no_grad():
        return sd.unet(X, torch.full((2,), STEP), text.expand(2, -1, -1))


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(
    "values",
    [{}, {"strength": 0.6, "beta": 0.4, "tau": 0.3}, {"gate": "hard"}, {"gate": "global"}],
    ids=lambda values: " ".join(values) or "default",
)
def test_one_concept(nodes, sd, folder, patcher, values):
    clip, model = comfy.Clip(sd), run(nodes.ApplyInfusion, model=patcher)
    positive = run(nodes.InfusionTextEncode, clip=clip, concepts=load(nodes, **values), text="a photo of a <rex>, red")
    negative = [[clip.encode_from_tokens(clip.tokenize("a cat")), {}]]
    drawn, against = comfy.predict(model, [positive, negative], X, STEP)
    assert distance(drawn, ours(sd, folder, ["a photo of a {}, red"] * 2, **values)) < 1e-5
    assert distance(drawn, plain(sd, positive[0][0])) > 1e-2
    assert distance(against, plain(sd, negative[0][0])) < 1e-5


def test_a_compact_concept_of_sdxls_size_is_read(nodes, tmp_path):
    names = [f"input_blocks.8.1.transformer_blocks.{i}.attn2" for i in range(60)]
    concept = Concept({name: torch.randn(1280) for name in names}, "cat", ("{}",), "sdxl")
    concept.save(tmp_path / "large.safetensors", "compact")
    found = nodes.read_concept(tmp_path / "large.safetensors")["residuals"]
    expected = Concept.load(tmp_path / "large.safetensors").tensors
    assert len(found) == 60 and all(map(torch.equal, found.values(), expected.values()))


def test_several_in_one_prompt_and_in_several(nodes, sd, folder, patcher):
    """Of one and two tokens, one of them twice; combined conditioning; and a concept in the negative prompt."""
    clip, model = comfy.Clip(sd), run(nodes.ApplyInfusion, model=patcher)
    concepts = load(nodes, "stuffed animal", "<rex>2", strength=0.5, others=load(nodes))
    concepts = load(nodes, "orange", "fruit1", others=concepts)
    encode = lambda text: run(nodes.InfusionTextEncode, clip=clip, concepts=concepts, text=text)  # noqa: E731
    both, fruit = encode("a <rex> beside a <rex>2, a cat, a <rex>"), encode("an fruit1")
    drawn, against = comfy.predict(model, [both + fruit, fruit], X, STEP)
    first = ours(sd, folder, ["a {1} beside a {2}, a cat, a {1}"] * 2, ("cat", "stuffed animal"), strength=(1, 0.5))
    second = ours(sd, folder, ["a {}"] * 2, ("orange",))  # which reads "an orange", as the training prompts do
    assert distance(drawn, (first + second) / 2) < 1e-5 and distance(against, second) < 1e-5
    assert distance(first, second) > 1e-2


def test_without_a_concept_it_is_the_model_to_the_bit(nodes, sd, patcher):
    clip, model = comfy.Clip(sd), run(nodes.ApplyInfusion, model=patcher)
    plain_text = [[clip.encode_from_tokens(clip.tokenize("a photo of a cat")), {"pooled_output": None}]]
    base = comfy.predict(patcher, [plain_text, plain_text], X, STEP)
    silent = run(nodes.InfusionTextEncode, clip=clip, concepts=load(nodes, strength=0.0), text="a photo of a <rex>")
    unnamed = run(nodes.InfusionTextEncode, clip=clip, concepts=load(nodes), text="a photo of a cat")
    named = run(nodes.InfusionTextEncode, clip=clip, concepts=load(nodes), text="a photo of a <rex>")
    for each, conditioning in ((model, plain_text), (model, silent), (model, unnamed), (patcher, named)):
        assert torch.equal(comfy.predict(each, [conditioning, plain_text], X, STEP)[0], base[0])
    drawn = comfy.predict(model, [named, plain_text], X, STEP)
    assert not torch.equal(drawn[0], base[0]) and distance(drawn[1], base[1]) < 1e-5
    assert "patches_replace" not in patcher.model_options["transformer_options"]  # the model behind it is not touched
    assert model.object_patches == {"memory_usage_factor": 1.5}


def test_weights_long_prompts_and_what_lies_beside(nodes, sd, folder, patcher):
    """Encodings that weights changed are those that the gate sees; a text beside a longer one is repeated."""
    clip, model = comfy.Clip(sd), run(nodes.ApplyInfusion, model=patcher)
    text = "a photo of a (<rex>:1.4) on (grass:0.6)"
    weighted = run(nodes.InfusionTextEncode, clip=clip, concepts=load(nodes), text=text)
    encodings, said = weighted[0]
    concept = Concept.load(folder / "infusion" / "cat.safetensors")
    with Customised(sd, [concept], Settings(scale=1.0)) as custom:
        mask = custom.encode(["a photo of a {} on grass"])[1][0, 0] > 0
        gates = custom.gates[0](encodings, mask[None], custom.targets[0])
        assert (said["infusion"][0] - gates[0]).abs().max() < 1e-6
        denoiser = custom(["a photo of a {} on grass"] * 2)
        for name, value in (("text", encodings), ("gates", gates[None])):
            setattr(denoiser, name, value.expand(2, *value.shape[1:]))
        denoiser.stacked = Context(encodings.expand(4, -1, -1))
        wanted = denoiser(X, torch.tensor(STEP))
    long = [[clip.encode_from_tokens(clip.tokenize("a dog " * 50)), {}]]
    assert long[0][0].shape[1] == 2 * encodings.shape[1]
    for negative in (long, [[clip.encode_from_tokens(clip.tokenize("")), {}]]):
        drawn, against = comfy.predict(model, [weighted, negative], X, STEP)
        assert distance(drawn, wanted) < 1e-5 and distance(against, plain(sd, negative[0][0])) < 1e-5
    behind = [[torch.cat([encodings, long[0][0]], 1), said]]  # ConditioningConcat
    assert distance(comfy.predict(model, [behind, long], X, STEP)[0], plain(sd, behind[0][0])) > 1e-3
    words = " ".join(["dog"] * 90)
    late = run(nodes.InfusionTextEncode, clip=clip, concepts=load(nodes), text=f"{words} <rex>")
    assert late[0][1]["infusion"][0][0].nonzero().flatten().tolist() == [77 + 1 + 90 - 75]


def test_beside_other_patches_and_a_controlnet(nodes, sd, folder, patcher):
    """What replaced a cross-attention before sees the rows that it knows, and what it changes is customised."""
    clip, seen = comfy.Clip(sd), []

    def half(q, k, v, options):
        seen.append((len(q), options["cond_or_uncond"], len(options["uuids"])))
        return 0.5 * comfy.optimized_attention(q, k, v, options["n_heads"])

    patched = patcher.clone()
    patched.set_model_attn2_replace(half, "input", 1)
    patched.set_model_attn2_replace(half, "output", 0, 0)
    model = run(nodes.ApplyInfusion, model=patched)
    named = run(nodes.InfusionTextEncode, clip=clip, concepts=load(nodes), text="a <rex>")
    silent = [[named[0][0], {}]]
    control = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    base = comfy.predict(patched, [silent, silent], X, STEP, control)
    seen.clear()
    drawn = comfy.predict(model, [named, silent], X, STEP, control)
    assert seen == [(4, [1, 0], 2)] * 2
    assert distance(drawn[1], base[1]) < 1e-5 < 1e-2 < distance(drawn[0], base[0])
    bare = comfy.predict(model, [named, silent], X, STEP)
    assert distance(drawn[0], bare[0] + control) < 1e-5  # the stand-in's control is added to the prediction


@pytest.mark.parametrize("noun", ["cat", "stuffed animal", "orange"])
def test_files_are_read_as_by_our_own_reader(nodes, folder, noun):
    path = folder / "infusion" / f"{noun}.safetensors"
    (read,), concept = load(nodes, noun), Concept.load(path)
    assert list(read["residuals"].values()) and all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(read["residuals"].values(), concept.tensors.values(), strict=True)
    )
    assert (read["noun"], read["base"], read["gate"]) == (noun, "tiny", "sigmoid")
    assert read["templates"][0] == ("a photo of an {}" if noun == "orange" else "a photo of a {}")


def test_what_is_refused(nodes, sd, folder, patcher):
    clip = comfy.Clip(sd)
    for given, said in (({"token": " "}, "is empty"), ({"others": load(nodes)}, "another concept's")):
        with pytest.raises(ValueError, match=said):
            load(nodes, **given)
    with pytest.raises(ValueError, match="for the method infusion"):
        load(nodes, "perfusion")
    with pytest.raises(ValueError, match="glued"):
        run(nodes.InfusionTextEncode, clip=clip, concepts=load(nodes), text="many <rex>s")
    with pytest.raises(ValueError, match="is of sd15"):
        run(nodes.InfusionTextEncode, clip=clip, concepts=load(nodes, "sd15"), text="a <rex>")
    wide = run(nodes.InfusionTextEncode, clip=clip, concepts=load(nodes, "wide"), text="a <rex>")
    with pytest.raises(ValueError, match="of another model"):
        comfy.predict(run(nodes.ApplyInfusion, model=patcher), [wide], X, STEP)


def test_the_registry_s_metadata_lacks_only_what_a_publisher_fills_in():
    said = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    project, comfy_said = said["project"], said["tool"]["comfy"]
    assert re.fullmatch(r"[a-z]([._-]?[a-z0-9])*", project["name"]) and len(project["name"]) < 100
    assert "comfyui" not in project["name"] and re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert set(project["license"]) == {"text"} and project["description"] and project["urls"].keys() == {"Repository"}
    assert comfy_said.keys() == {"PublisherId", "DisplayName", "Icon"} and comfy_said["DisplayName"]
    page = (FOLDER.parents[2] / "docs/comfyui.md").read_text()
    empty = [name for name, word in (project["urls"] | comfy_said).items() if not word and name != "Icon"]
    assert empty == ["Repository", "PublisherId"] and all(f"`{name}`" in page for name in empty)


def test_the_example_uses_the_nodes_as_they_are(nodes):
    """Every input of ours that a workflow names is one of the schema's, and nothing else is set."""
    prompt = json.loads((FOLDER / "example.json").read_text())
    for name in ("LoadInfusionConcept", "InfusionTextEncode", "ApplyInfusion"):
        _, schema = getattr(nodes, name).define_schema()
        inputs = {args[0]: options for args, options in schema["inputs"]}
        used = [node["inputs"] for node in prompt.values() if node["class_type"] == schema["node_id"]]
        assert used
        for given in used:
            needed = {name for name, options in inputs.items() if not options.get("optional")}
            assert needed <= given.keys() <= inputs.keys()
