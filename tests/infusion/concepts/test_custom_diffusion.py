import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from infusion.concepts.concept import Concept
from tests.infusion.concepts.conftest import SINGLE, WIDTH

PROMPT = "a photo of a {} on a hill"


def whole(pipe, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """diffusers' names of the cross-attentions' weights, all of which are new."""
    torch.manual_seed(0)
    tensors = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            for part in parts:
                start, end = part.split(".") if "." in part else (part, "")
                layer = module.get_submodule(part)
                for kind, tensor in layer.named_parameters():
                    key = f"{name}.processor.{start}_custom_diffusion.{end + '.' if end else ''}{kind}"
                    tensors[key] = tensor.detach() + 0.1 * torch.randn(tensor.shape)
        elif name.endswith("attn1"):
            tensors[f"{name}.processor"] = {}
    return tensors


@pytest.mark.parametrize("parts", [("to_k", "to_v"), ("to_k", "to_v", "to_q", "to_out.0")])
def test_the_images_are_those_of_diffusers(known, ours, theirs, pipeline, agree, tmp_path, parts):
    for name in SINGLE:
        pipe, folder = pipeline(name), tmp_path / name
        folder.mkdir()
        torch.save(whole(pipe, parts), folder / "pytorch_custom_diffusion_weights.bin")
        torch.save({"<new1>": torch.randn(WIDTH[name])}, folder / "<new1>.bin")
        concept = Concept.load(folder, superclass="dog")
        assert concept.method == "custom_diffusion" and concept.noun == "* dog"
        pipe.unet.load_attn_procs(folder, weight_name="pytorch_custom_diffusion_weights.bin", _pipeline=pipe)
        pipe.load_textual_inversion(str(folder), weight_name="<new1>.bin")
        agree(name, ours(name, [concept], PROMPT), theirs(pipe, name, PROMPT.replace("{}", "<new1> dog")), PROMPT)


def test_the_authors_files_are_the_same_concept(known, models, pipeline, tmp_path):
    """LDM's names with the word beside them, and a dict of the UNet's changes, whole or as products."""
    torch.manual_seed(0)
    unet, word = models["tiny"].unet, torch.randn(1, 32)
    names = [name for name in unet.state_dict() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    new = {name: torch.randn(unet.get_parameter(name).shape) for name in names}
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in new.items()} | {"embed": word}
    torch.save({"state_dict": state}, tmp_path / "delta.ckpt")
    concept = Concept.load(tmp_path / "delta.ckpt")
    assert concept.tensors.keys() == {"tokens", *(f"{name}.whole" for name in names)}
    assert all(torch.equal(concept.tensors[f"{name}.whole"], tensor) for name, tensor in new.items())
    assert torch.equal(concept.tensors["tokens"], word)
    layers = {name: name for name, _ in pipeline("tiny").unet.named_parameters() if "attn2.to_k" in name}
    u, v = torch.randn(32, 2), torch.randn(2, 32)
    first = next(name for name in layers if "down_blocks.0" in name)
    content = {"unet": {first: {"u": u, "v": v}}, "modifier_token": {"<new1>": word[0]}}
    torch.save(content, tmp_path / "delta.bin")
    concept = Concept.load(tmp_path / "delta.bin")
    (change,) = [name for name in concept.tensors if name.endswith(".down")]
    assert torch.equal(concept.tensors[change.replace(".down", ".up")], u) and torch.equal(concept.tensors[change], v)


def test_what_has_no_place_is_named(known, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"down_blocks.7.attn2.processor.to_k_custom_diffusion.weight": torch.ones(32, 32)}, path)
    with pytest.raises(ValueError, match="down_blocks_7_attn2_to_k"):
        Concept.load(path)
