import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from infusion.concepts import places as names
from infusion.concepts.concept import Concept
from infusion.deltas import DOWN, detach, weights_edited
from infusion.inject import cross_attention_layers
from infusion.methods import method_of
from tests.infusion.concepts.conftest import SINGLE

RANK, ALPHA = 3, 6.0
TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj",
    "net.2",
    "proj_in",
    "proj_out",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "fc1",
    "fc2",
)


def modules(model: nn.Module, convolutions: bool = False) -> dict[str, nn.Module]:
    found = dict(model.named_modules())
    return {
        name: module
        for name, module in found.items()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and name.endswith(TARGETS)
        or (convolutions and isinstance(module, nn.Conv2d) and ".conv" in name)
    }


def factors(module: nn.Module) -> tuple[Tensor, Tensor]:
    """A (r, in, …) and B (out, r, …) of a random change."""
    out, *inner = module.weight.shape
    ones = (1,) * (len(inner) - 1)
    return torch.randn(RANK, *inner) / 3, torch.randn(out, RANK, *ones) / 10


def peft(pipe, convolutions: bool = True) -> dict[str, Tensor]:
    tensors = {}
    for part, model in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        for name, module in modules(model, convolutions).items():
            down, up = factors(module)
            tensors |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    return tensors


def of_2023(pipe) -> dict[str, Tensor]:
    tensors = {}
    for part, model, middle in (("unet", pipe.unet, "lora"), ("text_encoder", pipe.text_encoder, "lora_linear_layer")):
        for name, module in modules(model).items():
            if isinstance(module, nn.Linear):
                if part == "text_encoder" and "text_model" not in name:
                    name = f"text_model.{name}"
                down, up = factors(module)
                tensors |= {f"{part}.{name}.{middle}.down.weight": down, f"{part}.{name}.{middle}.up.weight": up}
    return tensors


def oldest(pipe) -> dict[str, Tensor]:
    tensors = {}
    for name, module in modules(pipe.unet).items():
        if ".attn" in name:
            layer, part = name.removesuffix(".0").rsplit(".", 1)
            down, up = factors(module)
            start = f"{layer}.processor.{part}_lora"
            tensors |= {f"{start}.down.weight": down, f"{start}.up.weight": up}
    return tensors


def kohya(pipe) -> dict[str, Tensor]:
    tensors = {}
    for part, model in (("unet", pipe.unet), ("te", pipe.text_encoder)):
        for name, module in modules(model).items():
            if part == "te" and "text_model" not in name:
                name = f"text_model.{name}"
            down, up = factors(module)
            start = f"lora_{part}_{name.replace('.', '_')}"
            tensors |= {
                f"{start}.lora_down.weight": down,
                f"{start}.lora_up.weight": up,
                f"{start}.alpha": torch.tensor(ALPHA),
            }
    return tensors


MAKERS = {"PEFT": peft, "2023": of_2023, "oldest": oldest, "sd-scripts": kohya}


@pytest.mark.parametrize("layout", MAKERS)
@pytest.mark.parametrize("name", SINGLE)
def test_the_images_are_those_of_diffusers(known, ours, theirs, pipeline, agree, tmp_path, name, layout):
    """Every linear layer of the UNet and the text encoder, and with PEFT's names the convolutions."""
    torch.manual_seed(1)
    pipe = pipeline(name)
    tensors = MAKERS[layout](pipe)
    save_file(tensors, tmp_path / "style.safetensors")
    concept = Concept.load(tmp_path / "style.safetensors", architecture=name)
    pipe.load_lora_weights({f"unet.{key}": t for key, t in tensors.items()} if layout == "oldest" else tensors)
    agree(name, ours(name, [concept]), theirs(pipe, name))
    pipe.set_adapters(pipe.get_active_adapters(), 0.4)
    agree(name, ours(name, [concept], strength=0.4), theirs(pipe, name))


def changed(concept: Concept, model: nn.Module) -> dict[str, Tensor]:
    """Tensor -> its change, of the whole model."""
    model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edits = method_of(concept).differences(concept.tensors)
    full = {name if name.startswith("text.") else f"unet.{name}": [edit] for name, edit in edits.items()}
    with weights_edited(model, full):
        after = {name: model.get_submodule(name.rpartition(".")[0]) for name in full}
        found = {name: getattr(after[name], name.rpartition(".")[2]) - before[name] for name in full}
    assert not detach(model)
    return found


def pair(out: int, width: int) -> dict[str, Tensor]:
    return {
        "lora_down.weight": torch.randn(RANK, width),
        "lora_up.weight": torch.randn(out, RANK),
        "alpha": torch.tensor(ALPHA),
    }


def test_sdxls_names_of_both_layouts_lead_to_the_same_places(known, models, tmp_path):
    torch.manual_seed(0)
    ldm = "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k"
    theirs = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k"
    unet, first, second = pair(64, 80), pair(32, 32), {part: pair(48, 48) for part in "qkv"}
    for name, te1 in ((ldm, "lora_te1_text_model_encoder"), (theirs, "lora_te1_encoder")):
        tensors = {f"{name}.{role}": tensor for role, tensor in unet.items()}
        tensors |= {f"{te1}_layers_0_self_attn_q_proj.{role}": tensor for role, tensor in first.items()}
        for part, own in second.items():
            start = f"lora_te2_text_model_encoder_layers_1_self_attn_{part}_proj"
            tensors |= {f"{start}.{role}": tensor for role, tensor in own.items()}
        save_file(tensors, tmp_path / "a.safetensors")
        found = changed(Concept.load(tmp_path / "a.safetensors"), models["tinyxl"])

        def product(own: dict[str, Tensor]) -> Tensor:
            return ALPHA / RANK * own["lora_up.weight"] @ own["lora_down.weight"]

        expected = {
            "unet.input_blocks.3.1.transformer_blocks.1.attn2.to_k.weight": product(unet),
            "text.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": product(first),
            "text.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight": torch.cat(
                [product(second[p]) for p in "qkv"]
            ),
        }
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=1e-5)


def test_no_two_modules_have_one_name(models):
    """Without dots and with underscores in the names: what a key leads to is not ambiguous."""
    both = ("unet_input", "unet_middle", "unet_output", "unet_time_embed_", "unet_out_", "unet_label_emb_")
    for model in models.values():
        for ending in (".weight", ".bias"):
            found = names.places(model, ending)
            assert len(set(found.values())) == len(found) - sum(key.startswith(both) for key in found)


LYCORIS = {  # tensors of a layer of 64 × 48 numbers -> their change
    "LoHa": (
        {"hada_w1_a": (64, 3), "hada_w1_b": (3, 48), "hada_w2_a": (64, 3), "hada_w2_b": (3, 48), "alpha": ()},
        lambda t: (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"]) * t["alpha"] / 3,
    ),
    "LoKr": (
        {"lokr_w1": (8, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 12), "alpha": ()},
        lambda t: torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]) * t["alpha"] / 2,
    ),
    "LoKr, whole factors": (
        {"lokr_w1": (8, 4), "lokr_w2": (8, 12), "alpha": ()},
        lambda t: torch.kron(t["lokr_w1"], t["lokr_w2"]),
    ),
    "a difference": ({"diff": (64, 48)}, lambda t: t["diff"]),
}
LAYER = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"  # of tiny2


@pytest.mark.parametrize("kind", LYCORIS)
def test_changes_of_lycoris(known, models, tmp_path, kind):
    torch.manual_seed(0)
    shapes, expected = LYCORIS[kind]
    tensors = {role: torch.rand(shape) + 0.5 for role, shape in shapes.items()}
    save_file({f"{LAYER}.{role}": tensor for role, tensor in tensors.items()}, tmp_path / "a.safetensors")
    found = changed(Concept.load(tmp_path / "a.safetensors", architecture="tiny2"), models["tiny2"])
    (change,) = found.values()
    torch.testing.assert_close(change, expected(tensors), atol=1e-5, rtol=1e-4)


def test_the_middle_factor_of_locon(known, models, tmp_path):
    """A convolution: 1 × 1 down, 3 × 3 in the middle, 1 × 1 up."""
    torch.manual_seed(0)
    down, mid, up = torch.randn(2, 64, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(64, 2, 1, 1)
    start = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    save_file({f"{start}.{role}": t for role, t in tensors.items()}, tmp_path / "a.safetensors")
    (change,) = changed(Concept.load(tmp_path / "a.safetensors", architecture="tiny"), models["tiny"]).values()
    x = torch.randn(1, 64, 8, 8)
    through = nn.functional.conv2d(nn.functional.conv2d(nn.functional.conv2d(x, down), mid, padding=1), up) / 2
    torch.testing.assert_close(nn.functional.conv2d(x, change, padding=1), through, atol=1e-3, rtol=1e-3)


def test_cloneofsimos_numbers_and_words(known, models, tmp_path):
    """Down, up, middle; of each block attn1, the MLP's gate, attn2. Text: keys, values, queries, output."""
    unet = models["tiny"].unet
    blocks = [
        n
        for side in ("input", "output", "middle")
        for n, _ in unet.named_modules()
        if n.startswith(side) and n.endswith(".attn1")
    ]
    layers = []
    for block in blocks:
        attention = ["to_q", "to_k", "to_v", "to_out.0"]
        start = block.removesuffix("attn1")
        layers += (
            [f"{start}attn1.{p}" for p in attention]
            + [f"{start}ff.net.0.proj"]
            + [f"{start}attn2.{p}" for p in attention]
        )
    tensors = {"<s1>": torch.ones(32), "<s2>": torch.full((32,), 2.0)}
    for i, name in enumerate(layers):
        out, width = unet.get_submodule(name).weight.shape
        tensors |= {f"unet:{i}:down": torch.full((1, width), i + 1.0), f"unet:{i}:up": torch.ones(out, 1)}
    for i in range(8):
        tensors |= {f"text_encoder:{i}:down": torch.full((1, 32), i + 1.0), f"text_encoder:{i}:up": torch.ones(32, 1)}
    save_file(tensors, tmp_path / "a.safetensors", {"unet": json.dumps(["CrossAttention", "Attention", "GEGLU"])})
    concept = Concept.load(tmp_path / "a.safetensors")
    assert [concept.tensors[f"{name}.weight{DOWN}"][0, 0].item() for name in layers] == list(range(1, len(layers) + 1))
    start = "text.transformer.text_model.encoder.layers.1.self_attn."
    found = {part: concept.tensors[f"{start}{part}_proj.weight{DOWN}"][0, 0].item() for part in ("k", "v", "q", "out")}
    assert found == {"k": 5, "v": 6, "q": 7, "out": 8}
    assert torch.equal(concept.tensors["tokens"][:, 0], torch.tensor([1.0, 2.0])) and concept.noun == "* *"
    del tensors["unet:3:down"], tensors["unet:3:up"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="changes of the unet"):
        Concept.load(tmp_path / "a.safetensors")


def test_onetrainers_words_come_with_the_change(known, tmp_path):
    tensors = {f"{LAYER}.{role}": tensor for role, tensor in pair(64, 48).items()}
    tensors |= {"bundle_emb.tower.string_to_param.*": torch.ones(2, 48)}
    save_file(tensors, tmp_path / "a.safetensors")
    concept = Concept.load(tmp_path / "a.safetensors")
    assert (concept.superclass, concept.noun, concept.architecture) == ("tower", "* *", "tiny2")
    assert concept.tensors["tokens"].shape == (2, 48) and len(concept.tensors) == 3


def test_alphas_of_the_metadata(known, models, tmp_path):
    start = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    down, up = torch.randn(2, 48), torch.randn(64, 2)
    said = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1, "unet.r": 2})}
    save_file({f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}, tmp_path / "a.safetensors", said)
    (change,) = changed(Concept.load(tmp_path / "a.safetensors"), models["tiny2"]).values()
    torch.testing.assert_close(change, up @ down / 2)


def test_pefts_own_files_need_their_settings(known, models, tmp_path):
    start = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    down, up = torch.randn(2, 48), torch.randn(64, 2)
    save_file({f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter_config.json"):
        Concept.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 2, "alpha_pattern": {}}))
    (change,) = changed(Concept.load(tmp_path), models["tiny2"]).values()
    torch.testing.assert_close(change, 4 * up @ down)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "use_rslora": True}))
    with pytest.raises(ValueError, match="use_rslora"):
        Concept.load(tmp_path)


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ({"modelspec.trigger_phrase": "sks dog"}, "sks dog"),
        ({"ss_tag_frequency": json.dumps({"10_x": {"rex": 5, "grass": 2}, "2_y": {"grass": 1, "rex": 1}})}, "rex"),
        ({"ss_tag_frequency": json.dumps({"10_rex dog": {}})}, "rex dog"),
        ({"ss_tag_frequency": "[1"}, "my style"),
        ({}, "my style"),
    ],
)
def test_trigger_words(known, tmp_path, said, word):
    path = tmp_path / "my_style.safetensors"
    save_file({f"{LAYER}.{role}": tensor for role, tensor in pair(64, 48).items()}, path, said)
    assert Concept.load(path).noun == word
    assert Concept.load(path, noun="cat").noun == "cat"


def test_what_the_file_says_of_its_training(known, tmp_path):
    said = {"ss_steps": "1600", "ss_seed": "7", "ss_learning_rate": "1e-4", "ss_new_sd_model_hash": "ab" * 32}
    path = tmp_path / "a.safetensors"
    save_file({f"{LAYER}.{role}": tensor for role, tensor in pair(64, 48).items()}, path, said)
    concept = Concept.load(path)
    assert (concept.steps, concept.seed, concept.learning_rate) == (1600, 7, 1e-4)
    assert concept.base_hash == "ab" * 32


GOOD = {f"{LAYER}.{role}": tensor for role, tensor in pair(64, 48).items()}
BAD = {  # what is wrong -> changes of a good file, its metadata, what is said
    "a layer that is not there": (
        {"lora_unet_down_blocks_9_x.lora_up.weight": torch.ones(4, 2)},
        {},
        "down_blocks_9_x",
    ),
    "another tensor": ({"something.else": torch.ones(2)}, {}, "something.else"),
    "DoRA": ({f"{LAYER}.dora_scale": torch.ones(64)}, {}, "DoRA"),
    "no up": ({f"{LAYER}.lora_up.weight": None}, {}, "up"),
    "another rank": ({f"{LAYER}.lora_up.weight": torch.ones(64, 2)}, {}, "attn2_to_k"),
    "another width": ({f"{LAYER}.lora_up.weight": torch.ones(60, RANK)}, {}, "60"),
    "two names of one": ({f"{LAYER}.lora_A.weight": torch.ones(RANK, 48)}, {}, "twice"),
    "NaN": ({f"{LAYER}.lora_up.weight": torch.full((64, RANK), torch.nan)}, {}, "not finite"),
    "another base's name": ({}, {"modelspec.architecture": "Flux.1-dev/lora"}, "Flux.1-dev"),
    "another base": ({}, {"base_architecture": "tiny"}, "48 wide"),
    "SDXL": ({}, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_read_is_named(known, tmp_path, what):
    tensors, said, says = BAD[what]
    path = tmp_path / "a.safetensors"
    save_file({name: tensor for name, tensor in (GOOD | tensors).items() if tensor is not None}, path, said)
    with pytest.raises(ValueError, match=says) as error:
        Concept.load(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_with_a_concept_of_infusion(known, models, ours, tmp_path):
    """Both act; taken off, the model is the base again, bit for bit."""
    torch.manual_seed(0)
    path = tmp_path / "a.safetensors"
    save_file(GOOD, path)
    layers = cross_attention_layers(models["tiny2"].unet).items()
    residuals = {name: 3 * torch.randn(layer.heads * layer.dim_head) for name, layer in layers}
    concept, style = Concept(residuals, "dog", ("a {}",), "tiny2"), Concept.load(path)
    prompt, before = "a {1} on a hill", ours("tiny2", [], "a dog on a hill")
    images = [ours("tiny2", [concept, style], prompt, strength=[a, b]) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0))]
    both, alone, styled, neither = images
    assert torch.equal(neither, before) and torch.equal(ours("tiny2", [], "a dog on a hill"), before)
    assert torch.equal(alone, ours("tiny2", [concept], "a {} on a hill"))
    assert min((both - other).abs().max() for other in (alone, styled, before)) > 1e-3
