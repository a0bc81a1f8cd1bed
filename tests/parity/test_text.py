import open_clip
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

PROMPTS = ["a photo of a cat", "", "An oil painting, of two DOGS!  " + 30 * "very very "]


@pytest.mark.parametrize("architecture", ["sd15", "sd21"])
@torch.no_grad()
def test_encodings_are_those_of_transformers(ours, peer, checkpoint, agree, tmp_path):
    text = ours("text")
    tokens = text.tokenizer(PROMPTS)
    agree(text(PROMPTS), peer.load_text(checkpoint, tmp_path)(tokens).last_hidden_state)


@pytest.mark.parametrize("architecture", ["sd21"])
@torch.no_grad()
def test_encodings_are_those_of_open_clip(ours, checkpoint, agree):
    """open_clip's own text tower and tokenizer: penultimate layer, under the final norm."""
    prefix = "cond_stage_model.model."
    tensors = {name.removeprefix(prefix): t.float() for name, t in load_file(checkpoint).items() if prefix in name}
    settings = open_clip.get_model_config("ViT-H-14")
    tower = open_clip.model._build_text_tower(settings["embed_dim"], settings["text_cfg"])
    del tensors["logit_scale"]  # shared with the image tower
    tower.load_state_dict(tensors)
    tokens = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
    layers = tower.forward_intermediates(tokens, indices=[22], normalize_intermediates=True, output_fmt="NLC")
    agree(ours("text")(PROMPTS), layers["text_intermediates"][0])
