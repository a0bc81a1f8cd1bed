"""SDXL's two text encoders behind the interface of one, with transformers' models as the judges."""

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.models.text import ClipText, OpenClipText, TextPair
from ldm.models.tokenizer import Tokenizer
from ldm.weights.export import diffusers_tensors, text_config

PROMPTS = ["a photo of a cat", "", "a dog on a hill " * 4]


@pytest.fixture(scope="module")
def pair() -> TextPair:
    torch.manual_seed(0)
    first, second = (Tokenizer(merges=500, context_length=12, pad=pad) for pad in ("end", "zero"))
    clip = ClipText(first, hidden_size=16, intermediate_size=64, layers=3, heads=2, max_length=12, skip=1)
    sizes = {"hidden_size": 24, "layers": 3, "heads": 2, "max_length": 12, "projection_size": 20}
    text = TextPair(clip, OpenClipText(second, pools=True, **sizes)).requires_grad_(False).eval()
    for parameter in text.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return text


@pytest.fixture(scope="module")
def peers(pair) -> tuple[nn.Module, nn.Module]:
    """The same two as transformers' models, through their own names."""
    found = []
    for cls, text in zip((CLIPTextModel, CLIPTextModelWithProjection), pair.embedders, strict=True):
        model = cls(CLIPTextConfig(**text_config(text))).eval()
        tensors = diffusers_tensors(text, torch.float32)
        level = "text_model." if any(name.startswith("text_model.") for name in model.state_dict()) else ""
        model.load_state_dict({("" if "projection.w" in name else level) + name: t for name, t in tensors.items()})
        found.append(model)
    return tuple(found)


@torch.no_grad()
def test_encodings_are_the_penultimate_layers_without_norm_and_each_has_its_own_padding(pair, peers):
    ids = [text.tokenizer(PROMPTS) for text in pair.embedders]
    assert (ids[0] != ids[1]).any()  # the padding
    outputs = [peer(rows, output_hidden_states=True) for peer, rows in zip(peers, ids, strict=True)]
    expected = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    assert pair.width == 40 and expected.shape == (3, 12, 40)
    torch.testing.assert_close(pair(PROMPTS), expected, atol=1e-5, rtol=1e-5)
    context = pair.context(pair.tokenizer(PROMPTS))
    torch.testing.assert_close(context.text, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(context.pooled, outputs[1].text_embeds, atol=1e-5, rtol=1e-5)
    assert pair.pooled_width == 20 and context.sizes is None


@torch.no_grad()
def test_pooling_is_at_the_end_token_also_behind_a_learned_word(pair):
    tokens = pair.tokenizer(PROMPTS[:1])
    same, other = pair.embed(tokens[0, 4:5]), pair.embed(tokens[0, 2:3])  # of "cat" and of "photo"
    changed = tokens.clone()
    changed[0, 4] = pair.vocab_size
    plain, kept, learned = (pair.context(*given) for given in ((tokens,), (changed, same), (changed, other)))
    torch.testing.assert_close(kept.pooled, plain.pooled)
    torch.testing.assert_close(kept.text, plain.text)
    assert (learned.pooled - plain.pooled).abs().max() > 1e-3 and pair.embed(tokens[0]).shape == (12, 40)
    assert (learned.text - plain.text)[:, 4:].abs().amax((0, 1)).min() > 1e-6  # both encoders read it


@torch.no_grad()
def test_an_empty_negative_prompt_is_all_zeros_and_any_other_is_encoded(pair):
    nothing, space, words = (pair.unconditional(words) for words in ("", " ", "blurry"))
    assert not nothing.text.any() and not nothing.pooled.any()
    assert nothing.text.shape == (1, 12, 40) and nothing.pooled.shape == (1, 20)
    assert torch.equal(space.text, pair([""])) and torch.equal(words.text, pair(["blurry"]))


@torch.no_grad()
def test_a_prompt_beside_a_longer_one_is_the_same_followed_by_what_does_not_count(pair):
    texts = ["red " * 25, "a cat", "red " * 12]
    context = pair.context(pair.tokenizer.windows(texts))
    assert context.text.shape == (3, 36, 40) and context.attended.sum(1).tolist() == [36, 12, 24]
    for row, text in enumerate(texts):
        alone = pair.context(pair.tokenizer.windows([text]))
        own = context.map(lambda rows, row=row: rows[row : row + 1])
        assert alone.attended is None
        torch.testing.assert_close(own.text[own.attended], alone.text[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own.pooled, alone.pooled, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_gate_compares_each_part_under_its_own_final_norm(pair, peers):
    encodings = pair(PROMPTS)
    compared = pair.comparable(encodings)
    norms = [module for peer in peers for n, module in peer.named_modules() if n.endswith("final_layer_norm")]
    expected = [norm(part) for norm, part in zip(norms, encodings.split([16, 24], -1), strict=True)]
    torch.testing.assert_close(compared, torch.cat(expected, -1))


def test_encoders_that_do_not_belong_together_are_refused(pair):
    first, second = pair.embedders
    long, sizes = Tokenizer(merges=500, context_length=13), {"hidden_size": 16, "layers": 2, "heads": 2}
    other = ClipText(long, intermediate_size=32, max_length=13, **sizes)
    with pytest.raises(ValueError, match="must read the same ids"):
        TextPair(other, second)
    with pytest.raises(ValueError, match="pools"):
        TextPair(first, OpenClipText(second.tokenizer, max_length=12, **sizes))
    with pytest.raises(ValueError, match="skip must lie between 0 and 1"):
        ClipText(first.tokenizer, max_length=12, skip=2, **sizes)
