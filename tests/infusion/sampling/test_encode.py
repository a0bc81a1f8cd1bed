import pytest
import torch

from infusion.sampling.encode import encode, own_embeddings
from ldm.models.text import OpenClipText


@pytest.fixture(params=["clip", "openclip"])
def text(request, sd, tokenizer):
    if request.param == "clip":
        return sd.text
    torch.manual_seed(0)
    model = OpenClipText(tokenizer, hidden_size=32, layers=3, heads=2).requires_grad_(False).eval()
    with torch.no_grad():
        model.embeddings.mul_(50)
    return model


def test_the_vocabularys_own_embeddings_change_nothing(text):
    plain, masks = encode(text, ["a photo of a {}", "grass"], ["cat"])
    learned, same = encode(text, ["a photo of a {}", "grass"], ["cat"], [own_embeddings(text, "cat")])
    torch.testing.assert_close(learned.text, plain.text, atol=1e-5, rtol=1e-5)
    assert torch.equal(masks, same) and masks.sum((1, 2)).tolist() == [1, 0]


def test_another_words_embedding_is_that_word(text):
    learned, _ = encode(text, ["a photo of a {} and a cat"], ["cat"], [own_embeddings(text, "dog")])
    torch.testing.assert_close(learned.text, text(["a photo of a dog and a cat"]), atol=1e-5, rtol=1e-5)


def test_each_concept_has_its_own_and_only_the_first_tokens(text):
    rows = [own_embeddings(text, "dog"), None, own_embeddings(text, "red")]
    learned, _ = encode(text, ["a {1} {2} {3}"], ["cat", "horse", "blue car"], rows)
    torch.testing.assert_close(learned.text, text(["a dog horse red car"]), atol=1e-5, rtol=1e-5)


def test_gradients_reach_what_is_learned(text):
    rows = own_embeddings(text, "cat").requires_grad_()
    encode(text, ["a {} on grass"], ["cat"], [rows])[0].text.square().sum().backward()
    assert rows.grad.abs().max() > 0 and text.embeddings.grad is None


def test_another_width_is_refused(text):
    with pytest.raises(ValueError, match="32 wide"):
        encode(text, ["a {}"], ["cat"], [torch.zeros(1, 5)])
