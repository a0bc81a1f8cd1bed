"""L2 to the start, output preservation, fixed norm and class semantics, on every method that takes them."""

import pytest
import torch
import torch.nn.functional as F

from infusion.methods import find_method
from infusion.methods.base import TOKENS
from infusion.methods.lora import DOWN, UP
from infusion.regularisers.class_semantics import ClassSemantics
from infusion.regularisers.fixed_norm import FixedNorm
from infusion.regularisers.l2_to_start import L2ToStart
from infusion.regularisers.output_preservation import OutputPreservation
from infusion.sampling.encode import encode
from infusion.training.trainer import ConceptTrainer
from ldm.models.attention import Context
from ldm.util.cli import UserError

TEMPLATES = ["a photo of a {}", "the {} in a box"]


@pytest.fixture
def batch():
    return {"latents": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), "template": TEMPLATES}


def make(sd, name, term=None, options=None, **rest):
    regularisers = {} if term is None else {"term": term}
    module = ConceptTrainer(
        sd, find_method(name)(**(options or {})), "cat", TEMPLATES, **rest, regularisers=regularisers
    )
    module.log = module.log_dict = lambda *_, **__: None
    return module


def value(module, batch, number=0):
    """The term for a batch."""
    (term,) = module.regularisers.values()
    text, _ = module.encode(batch["template"])
    return term.term(module.sd, module.method, module.tensors, module.step("term", batch, number, text))


def move(module, by=0.1):
    """Changes what is learned at random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in module.tensors.values():
            if tensor.requires_grad:
                tensor.add_(by * torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize("name", ["infusion", "infusion_word", "textual_inversion", "custom_diffusion", "dreambooth"])
def test_the_gradient_of_l2_is_twice_the_distance(sd, batch, name):
    module = make(sd, name, L2ToStart())
    start = {key: tensor.detach().clone() for key, tensor in module.tensors.items()}
    assert value(module, batch).item() == 0
    move(module)
    value(module, batch).backward()
    for key, tensor in module.tensors.items():
        torch.testing.assert_close(tensor.grad, 2 * (tensor.detach() - start[key]), atol=1e-6, rtol=1e-5)


def test_l2_of_a_low_rank_is_that_of_the_change(sd, batch):
    module = make(sd, "lora", L2ToStart(), {"train_text_encoder": True, "alpha": 8.0})
    assert value(module, batch).item() == 0  # whatever A is
    move(module)
    tensors = module.tensors
    changes = [2.0 * tensors[name] @ tensors[name.replace(UP, DOWN)] for name in tensors if name.endswith(UP)]
    torch.testing.assert_close(value(module, batch), sum(change.square().sum() for change in changes))


@pytest.mark.parametrize("name", ["dreambooth", "lora", "custom_diffusion", "t_lora"])
def test_preservation_is_zero_at_the_start_and_sees_a_change(sd, batch, name):
    options = {"t_lora": {"rank": 8, "min_rank": 4}}.get(name)
    module = make(sd, name, OutputPreservation(), options)
    assert value(module, batch).item() < 1e-10
    move(module)
    distance = value(module, batch)
    assert distance > 1e-6
    distance.backward()
    assert any(tensor.grad is not None and tensor.grad.any() for tensor in module.tensors.values())
    assert torch.equal(value(module, batch), distance)  # its draws are of seed, step and batch alone
    assert not torch.equal(value(module, batch, number=1), distance)


def test_preservation_compares_with_the_base_model(sd, batch):
    """By hand: the empty caption for every row, and the base model without the change."""
    module = make(sd, "dreambooth", OutputPreservation(empty=1.0))
    move(module, 0.01)
    distance = value(module, batch)
    generator = module.step("term", batch, 0, Context(sd.text([""]))).generator
    torch.rand(2, generator=generator)  # which rows have the empty caption
    timesteps, noise = module.draw(batch["latents"], generator)
    noisy, text = sd.schedule.add_noise(batch["latents"], noise, timesteps), sd.text(["", ""])
    customised = sd.unet(noisy, timesteps, text)
    with module.unedited():
        base = sd.unet(noisy, timesteps, text)
    torch.testing.assert_close(distance, F.mse_loss(customised, base))


@pytest.mark.parametrize("name", ["infusion", "infusion_word", "textual_inversion"])
def test_what_acts_on_the_concepts_tokens_alone_has_nothing_to_preserve(sd, batch, name):
    module = make(sd, name, OutputPreservation())
    move(module)
    assert value(module, batch).item() < 1e-10


def test_the_norm_of_a_word_stays_and_its_direction_is_drawn_to_the_superclass(sd, batch):
    norm = sd.text.embeddings.norm(dim=1).mean()
    module = make(sd, "custom_diffusion", FixedNorm(weight=1.0), learning_rate=0.1)
    tokens, direction = module.tensors[TOKENS], module.regularisers["term"].direction
    torch.testing.assert_close(tokens.norm(dim=1), norm[None])
    start = F.normalize(tokens.detach()[0], dim=0)
    optimizer, cosines = module.configure_optimizers(), []
    for _ in range(20):
        optimizer.zero_grad()
        value(module, batch).backward()
        assert (tokens.grad * tokens).sum().abs() < 1e-6  # the gradient is tangential
        optimizer.step()
        torch.testing.assert_close(tokens.norm(dim=1), norm[None], atol=1e-6, rtol=1e-6)
        cosines.append((F.normalize(tokens.detach()[0], dim=0) @ direction).item())
    assert cosines == sorted(cosines) and cosines[-1] > (start @ direction) + 0.3


def test_a_step_of_fixed_norm_goes_along_the_great_circle_of_its_gradient(sd, batch):
    module = make(sd, "custom_diffusion", FixedNorm())
    tokens, term = module.tensors[TOKENS], module.regularisers["term"]
    value(module, batch).backward()
    start, gradient = tokens.detach().clone(), tokens.grad
    with torch.no_grad():
        tokens.sub_(20 * gradient)
        term.settle(module.tensors)
    angle = torch.atan(20 * gradient.norm() / term.norm[0])
    assert angle > 0.3
    torch.testing.assert_close(
        tokens.detach(), angle.cos() * start - angle.sin() * term.norm[0] * F.normalize(gradient, dim=1)
    )


def test_a_weight_of_zero_still_fixes_the_norm_and_nothing_else(sd, batch):
    plain, fixed = make(sd, "textual_inversion"), make(sd, "textual_inversion", FixedNorm(weight=0.0))
    for module in (plain, fixed):
        with torch.no_grad():
            module.tensors[TOKENS].copy_(fixed.tensors[TOKENS])
        module.training_step(batch, 0).backward()
    assert torch.equal(plain.tensors[TOKENS].grad, fixed.tensors[TOKENS].grad)


@pytest.mark.parametrize("pooling", ["end", "argmax"])
def test_class_semantics_compares_two_sentences(sd, batch, pooling):
    module = make(sd, "custom_diffusion", ClassSemantics(pooling=pooling))
    term, tokens = module.regularisers["term"], module.tensors[TOKENS]
    own, _ = encode(sd.text, ["a photo of a {}"], ["sks cat"], [tokens])
    plain = sd.text(["a photo of a cat"])
    place = {"end": 7, "argmax": 5}[pooling]  # begin, a, photo, of, a, sks, cat, end
    expected = 1 - F.cosine_similarity(own.text[0, place], plain[0, 6], dim=0)
    torch.testing.assert_close(value(module, batch), expected)
    optimizer = torch.optim.Adam([tokens], 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        value(module, batch).backward()
        optimizer.step()
    assert value(module, batch) < 0.7 * expected
    assert term.weight == 1.0


def test_class_semantics_of_textual_inversion_starts_at_zero(sd, batch):
    """Its word takes the superclass's place, and starts as it."""
    assert value(make(sd, "textual_inversion", ClassSemantics()), batch).abs() < 1e-6


@pytest.mark.parametrize("term", [ClassSemantics(), FixedNorm()])
@pytest.mark.parametrize("name", ["infusion", "lora", "dreambooth"])
def test_without_a_learned_word_a_term_about_words_is_refused(sd, term, name):
    with pytest.raises(UserError, match=f"regularisers.term: {name} learns n"):
        make(sd, name, term)


@pytest.mark.parametrize(
    ("term", "arguments"),
    [
        (L2ToStart, {"weight": -1.0}),
        (FixedNorm, {"weight": float("nan")}),
        (OutputPreservation, {"empty": 1.5}),
        (ClassSemantics, {"template": "a cat"}),
    ],
)
def test_arguments_out_of_range_are_refused(term, arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        term(**arguments)


def test_terms_together_draw_as_alone(sd, batch):
    alone = make(sd, "textual_inversion", OutputPreservation())
    both = ConceptTrainer(sd, find_method("textual_inversion")(), "cat", TEMPLATES,
                          regularisers={"first": L2ToStart(), "term": OutputPreservation()})  # fmt: skip
    text, _ = alone.encode(TEMPLATES)
    draws = [torch.rand(3, generator=module.step("term", batch, 0, text).generator) for module in (alone, both)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], torch.rand(3, generator=both.step("first", batch, 0, text).generator))
