"""P+: with the same word everywhere it is Textual Inversion, and each layer reads its own."""

from dataclasses import replace

import pytest
import torch

from infusion.concepts.concept import Concept
from infusion.inject import cross_attention_layers, remove
from infusion.methods.base import TOKENS
from infusion.methods.infusion import Infusion
from infusion.methods.p_plus import PPlus
from infusion.methods.textual_inversion import TextualInversion
from infusion.regularisers.class_semantics import ClassSemantics
from infusion.regularisers.fixed_norm import FixedNorm
from infusion.sampling.customised import Customised
from infusion.sampling.encode import encode
from infusion.sampling.settings import Settings
from infusion.training.trainer import ConceptTrainer
from ldm.models.attention import transformer_of
from ldm.util.cli import UserError

TEMPLATES = ["a photo of a {}", "the {} in a box"]
T = torch.tensor(400)


@pytest.fixture
def latents():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def make(sd, method, noun="stuffed animal", **options):
    return ConceptTrainer(sd, method, noun, TEMPLATES, **options)


def pair(sd, noun="stuffed animal"):
    """Concepts of Textual Inversion and of P+, of the same random word of two tokens."""
    module = make(sd, PPlus(), noun)
    word = torch.randn(module.concept().tensors[next(iter(module.tensors))].shape)
    every = replace(module.concept(), tensors=dict.fromkeys(module.tensors, word))
    remove(sd.unet)
    return replace(make(sd, TextualInversion(), noun).concept(), tensors={TOKENS: word}), every


def different(concept, seed=0):
    """The concept with another word in every layer."""
    generator = torch.Generator().manual_seed(seed)
    words = {name: torch.randn(word.shape, generator=generator) for name, word in concept.tensors.items()}
    return replace(concept, tensors=words)


def predict(sd, concepts, templates, latents, **settings):
    with torch.no_grad(), Customised(sd, concepts, Settings(**{"scale": 3.0, "strength": 1.0} | settings)) as model:
        return model(templates)(latents, T)


@pytest.mark.parametrize("settings", [{}, {"scale": 1.0}, {"strength": 0.6}, {"negative_prompt": "blurry"}])
def test_one_word_everywhere_is_textual_inversion(sd, latents, settings):
    one, every = pair(sd)
    expected = predict(sd, [one], TEMPLATES, latents, **settings)
    torch.testing.assert_close(predict(sd, [every], TEMPLATES, latents, **settings), expected, atol=1e-5, rtol=1e-5)
    assert (predict(sd, [different(every)], TEMPLATES, latents, **settings) - expected).abs().max() > 1e-3


def test_its_gradients_are_the_parts_of_that_of_textual_inversion(sd, latents):
    batch, gradients = {"latents": latents, "template": TEMPLATES}, []
    for method in (TextualInversion(), PPlus()):
        module = make(sd, method)
        module.denoising_loss(batch, torch.Generator().manual_seed(1), {}).backward()
        gradients.append([tensor.grad for tensor in module.tensors.values()])
        assert all(parameter.grad is None for parameter in sd.text.parameters())
        learned = {id(tensor) for tensor in module.tensors.values()}
        assert all(p.grad is None for p in sd.unet.parameters() if id(p) not in learned)
        remove(sd.unet)
    (whole,), parts = gradients
    assert len(parts) == 7 and all(part.any() for part in parts)
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, atol=1e-6, rtol=1e-4)


def test_each_layer_reads_its_own_word_and_the_prompt_around_it(sd, latents):
    every, read, hooks = different(pair(sd)[1]), {}, []
    for name, layer in cross_attention_layers(sd.unet).items():
        keep = lambda module, given, name=name: read.update({name: given[0][-2:]})  # noqa: E731
        hooks.append(layer.to_k.register_forward_pre_hook(keep))
    predict(sd, [every], TEMPLATES, latents)
    for hook in hooks:
        hook.remove()
    assert len(read) == len(every.tensors) == 7
    for name, text in read.items():
        word = every.tensors[f"{TOKENS}.{transformer_of(name)}"]
        expected, masks = encode(sd.text, TEMPLATES, [every.noun], [word])
        torch.testing.assert_close(text, expected.text, atol=1e-5, rtol=1e-5)
        assert torch.equal(text[0, : masks[0, 0].int().argmax()], expected.text[0, : masks[0, 0].int().argmax()])


def test_what_is_no_layer_reads_the_mean_and_prompts_without_the_word_are_encoded_once(sd):
    words = PPlus().tokens(different(pair(sd)[1]).tensors)
    context, _ = encode(sd.text, TEMPLATES, ["stuffed animal"], [words])
    torch.testing.assert_close(torch.stack(list(context.texts.values())).mean(0), context.text)
    asked, encode_tokens = [], sd.text.encode_tokens
    sd.text.encode_tokens = lambda tokens, *rest: asked.append(len(tokens)) or encode_tokens(tokens, *rest)
    without, _ = encode(sd.text, ["grass", "a cat"], ["stuffed animal"], [words])
    assert asked == [2] and not without.texts


@pytest.mark.parametrize("beside", ["textual_inversion", "infusion"])
def test_beside_concepts_of_other_methods(sd, latents, beside):
    one, every = pair(sd, "cat")
    templates = ["a {1} beside a {2}", "the {2} on a {1}"]
    if beside == "infusion":
        other = make(sd, Infusion(), "dog").concept()
        remove(sd.unet)
        other = replace(other, tensors={name: torch.randn(r.shape) for name, r in other.tensors.items()})
    else:
        other = pair(sd, "dog")[0]
    expected = predict(sd, [one, other], templates, latents)
    torch.testing.assert_close(predict(sd, [every, other], templates, latents), expected, atol=1e-4, rtol=1e-4)
    assert (expected - predict(sd, [one, other], templates, latents, strength=[1.0, 0.0])).abs().max() > 1e-3


def test_a_strength_lies_between_the_superclass_and_the_words(sd, latents):
    every, usual = different(pair(sd)[1]), PPlus().start(sd, pair(sd)[1].word)
    between = {name: torch.lerp(usual[name].detach(), word, 0.3) for name, word in every.tensors.items()}
    weaker = predict(sd, [every], TEMPLATES, latents, strength=0.3)
    expected = predict(sd, [replace(every, tensors=between)], TEMPLATES, latents)
    torch.testing.assert_close(weaker, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["full", "half", "compact"])
def test_a_file_has_a_word_for_each_layer(sd, tmp_path, form):
    every = different(pair(sd)[1])
    every.save(tmp_path / "c.safetensors", form)
    again = Concept.load(tmp_path / "c.safetensors")
    assert again.method == "p_plus" and again.tensors.keys() == every.tensors.keys()
    assert again.relative_error(every) < {"full": 1e-9, "half": 1e-3, "compact": 0.05}[form]


def test_words_that_are_not_one_for_each_layer_are_refused(sd):
    every = pair(sd)[1]
    first, *rest = every.tensors
    lacking = {name: every.tensors[name] for name in rest}
    for tensors, says in (
        (lacking, f"lacks '{first}'"),
        (every.tensors | {rest[0]: torch.zeros(1, sd.text.width)}, r"is \(1, 32\)"),
        (every.tensors | {TOKENS: torch.zeros(1, sd.text.width)}, "tensor 'tokens'"),
    ):
        with pytest.raises(UserError, match=says):
            Customised(sd, [replace(every, tensors=tensors)])


def moved(sd, method, term):
    """A trainer whose words are not those of the start."""
    module = make(sd, method, regularisers={"term": term})
    with torch.no_grad():
        for word in module.tensors.values():
            word.mul_(torch.linspace(0.5, 2, word.shape[1]))
    return module


@pytest.mark.parametrize("pooling", ["end", "argmax"])
def test_class_semantics_acts_on_the_words_together(sd, pooling):
    values, gradients, term = [], [], ClassSemantics(pooling=pooling)
    for method in (TextualInversion(), PPlus()):
        module = moved(sd, method, term)
        values.append(term.term(sd, method, module.tensors, None))
        values[-1].backward()
        gradients.append(torch.stack([word.grad for word in module.tensors.values()]).sum(0))
        remove(sd.unet)
    torch.testing.assert_close(*values, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_each_word_has_the_fixed_norm(sd):
    term = FixedNorm()
    module = moved(sd, PPlus(), term)
    with torch.no_grad():
        term.settle(module.tensors)
    for word in module.tensors.values():
        torch.testing.assert_close(word.norm(dim=1), term.norm[:2])
    term.term(sd, module.method, module.tensors, None).backward()
    assert all(word.grad.any() for word in module.tensors.values())
