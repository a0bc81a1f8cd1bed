from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.models.text import ClipText, OpenClipText
from ldm.models.tokenizer import Tokenizer

MANIFESTS = Path(__file__).parents[1] / "manifests"


def manifest(name: str, prefix: str) -> dict[str, str]:
    tensors = dict(line.split(" ") for line in (MANIFESTS / f"{name}.txt").read_text().splitlines())
    return {prefix + name: shape for name, shape in tensors.items() if name != "embeddings.position_ids"}


def shapes(model: nn.Module) -> dict[str, str]:
    return {name: "[" + ",".join(map(str, t.shape)) + "]" for name, t in model.state_dict().items()}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(merges=500, context_length=10)


def clip(tokenizer, **options) -> ClipText:
    torch.manual_seed(0)
    return ClipText(tokenizer, hidden_size=32, intermediate_size=128, layers=3, heads=4, max_length=10, **options)


def openclip(tokenizer, **options) -> OpenClipText:
    torch.manual_seed(0)
    return OpenClipText(tokenizer, hidden_size=32, layers=3, heads=4, max_length=10, **options)


@pytest.mark.parametrize(
    "encoder, name, prefix, width",
    [(ClipText, "CLIP-v1-SD", "transformer.text_model.", 768), (OpenClipText, "CLIP-v2-SD", "model.", 1024)],
)
def test_tensors_are_those_of_the_published_checkpoint(encoder, name, prefix, width):
    with torch.device("meta"):
        text = encoder(Tokenizer())
    assert shapes(text) == manifest(name, prefix)
    assert text.width == width
    assert all(p.is_meta for p in text.parameters())
    assert not any(b.is_meta for b in text.buffers())  # they are in no checkpoint, so they must be real at once


@pytest.mark.parametrize("make", [clip, openclip])
def test_encodings_see_only_what_came_before(make, tokenizer):
    text = make(tokenizer)
    prompts = ["a cat on a hill", "a cat in the snow"]
    encodings = text(prompts)
    assert encodings.shape == (2, 10, 32) and encodings.dtype == torch.float32
    assert torch.equal(encodings, text.encode_tokens(tokenizer(prompts)))
    shared = (tokenizer(prompts)[0] == tokenizer(prompts)[1]).int().cumprod(0).sum()
    assert 3 <= shared < 9
    torch.testing.assert_close(encodings[0, :shared], encodings[1, :shared])
    assert (encodings[0, shared:] - encodings[1, shared:]).abs().amax(-1).min() > 1e-3


def test_clip_ends_with_the_final_norm(tokenizer):
    text = clip(tokenizer)
    encodings = text(["a cat"])
    torch.testing.assert_close(encodings.mean(-1), torch.zeros(1, 10), atol=1e-5, rtol=0)
    torch.testing.assert_close(encodings.var(-1, correction=0), torch.ones(1, 10), atol=1e-3, rtol=0)
    nn.init.zeros_(text.transformer["text_model"].final_layer_norm.weight)
    assert text(["a cat"]).abs().max() == 0


def test_openclip_is_the_penultimate_layer_under_the_final_norm(tokenizer):
    text = openclip(tokenizer)
    outputs = []
    text.model.transformer.resblocks[-2].register_forward_hook(lambda module, args, output: outputs.append(output))
    text.model.encode_text(tokenizer(["a photo of a cat"]))  # open_clip's own forward
    torch.testing.assert_close(text(["a photo of a cat"]), text.model.ln_final(outputs[0]))


def test_openclip_s_pooled_vector_is_the_one_it_compares_with_images(tokenizer):
    text, tokens = openclip(tokenizer), tokenizer(["a photo of a cat", "the"])
    torch.testing.assert_close(text.pooled(tokens), text.model.encode_text(tokens))


def test_both_towers_compute_the_same_from_the_same_weights(tokenizer):
    a, b = clip(tokenizer, hidden_act="gelu"), openclip(tokenizer, skip=0)
    tower, model = a.transformer["text_model"], b.model
    pairs = [(tower.embeddings.token_embedding.weight, model.token_embedding.weight),
             (tower.embeddings.position_embedding.weight, model.positional_embedding)]  # fmt: skip
    for ours, theirs in zip(tower.encoder.layers, model.transformer.resblocks, strict=True):
        attention = ours.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        pairs.append((torch.cat([p.weight for p in projections]), theirs.attn.in_proj_weight))
        pairs.append((attention.out_proj.weight, theirs.attn.out_proj.weight))
        pairs += [(ours.mlp.fc1.weight, theirs.mlp.c_fc.weight), (ours.mlp.fc2.weight, theirs.mlp.c_proj.weight)]
        pairs += [(ours.mlp.fc1.bias, theirs.mlp.c_fc.bias), (ours.mlp.fc2.bias, theirs.mlp.c_proj.bias)]
    with torch.no_grad():
        for source, target in pairs:
            target.copy_(source)
    torch.testing.assert_close(a(["a photo of a cat"]), b(["a photo of a cat"]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [clip, openclip])
def test_a_tokenizer_that_does_not_fit_is_refused(make, tokenizer):
    with pytest.raises(ValueError, match="1014 ids"):
        make(tokenizer, vocab_size=1000)
    with pytest.raises(ValueError, match="context_length is 77"):
        make(Tokenizer(merges=500))


def test_openclip_keeps_at_least_one_layer(tokenizer):
    with pytest.raises(ValueError, match="skip"):
        openclip(tokenizer, skip=3)
