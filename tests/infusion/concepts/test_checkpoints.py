import copy

import pytest
import torch
from diffusers import DiffusionPipeline

from infusion.concepts.concept import Concept
from ldm.weights.checkpoint import save
from ldm.weights.export import export_diffusers
from tests.infusion.concepts.conftest import NODES

PROMPT = "a photo of a sks dog"


@pytest.fixture
def tuned(models):
    """The models, each of whose numbers is a little different."""

    def make(name: str):
        sd = copy.deepcopy(models[name])
        with torch.no_grad():
            for parameter in sd.parameters():
                parameter.mul_(1 + 0.05 * torch.randn(parameter.shape))
        return sd

    return make


@pytest.mark.parametrize("name", NODES)
def test_the_images_are_those_of_the_checkpoint(known, models, ours, tuned, theirs, agree, tmp_path, name):
    torch.manual_seed(0)
    sd = tuned(name)
    save(tmp_path / "a.safetensors", dict(sd.named_children()), name, torch.float32)
    export_diffusers(sd, tmp_path / "folder")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    before = {key: tensor.clone() for key, tensor in models[name].state_dict().items()}
    for path in (tmp_path / "a.safetensors", tmp_path / "folder"):
        concept = Concept.load(path)
        assert concept.method == "dreambooth" and concept.architecture == name
        agree(name, ours(name, [concept], PROMPT), theirs(pipe, name, PROMPT), PROMPT)
    assert all(torch.equal(tensor, before[key]) for key, tensor in models[name].state_dict().items())
    assert torch.equal(ours(name, [concept], PROMPT, strength=0.0), ours(name, [], PROMPT))


def test_a_tensor_too_many_or_too_few_is_named(known, models, tmp_path):
    path = tmp_path / "a.ckpt"
    save(tmp_path / "a.safetensors", dict(models["tiny"].named_children()), "tiny")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "a.safetensors")
    torch.save({"state_dict": tensors | {"control_model.x": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=r"also has control_model\.x"):
        Concept.load(path)
    del tensors["model.diffusion_model.out.2.bias"]
    torch.save({"state_dict": tensors}, path)
    with pytest.raises(ValueError, match=r"lacks model\.diffusion_model\.out\.2\.bias"):
        Concept.load(path)
