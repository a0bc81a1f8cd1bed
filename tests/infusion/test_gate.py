import math

import pytest
import torch

from infusion.gate import Gate, fingerprint, target_input
from infusion.tokens import Word, concept_mask


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def covariance(width):
    root = torch.randn(width, width, dtype=torch.float64)
    return torch.linalg.inv(root @ root.T + torch.eye(width, dtype=torch.float64))


@pytest.fixture
def encodings():
    torch.manual_seed(0)
    return torch.randn(2, 5, 8, dtype=torch.float64)


@pytest.fixture
def mask():
    return torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("beta, tau", [(0.75, 0.1), (0.7, 0.15), (0.0, 1.0)])
@pytest.mark.parametrize("inverse_covariance", [None, covariance(8)])
def test_on_the_target_itself(encodings, mask, beta, tau, inverse_covariance):
    target = encodings[0, 2].clone()
    gates = Gate("sigmoid", beta, tau)(encodings, mask, target, inverse_covariance)
    assert gates[0, 2].item() == pytest.approx(sigmoid((1 - beta) / tau), rel=1e-12)


def test_closed_form(encodings, mask):
    target, inverse = torch.randn(8, dtype=torch.float64), covariance(8)
    gates = Gate("global", 0.3, 0.2)(encodings, mask, target, inverse)
    for b in range(2):
        for j in range(5):
            similarity = (encodings[b, j] @ inverse @ target) / (target @ inverse @ target)
            assert gates[b, j].item() == pytest.approx(sigmoid((similarity.item() - 0.3) / 0.2), rel=1e-9)


def test_kinds_differ_in_where_they_open(encodings, mask):
    target = torch.randn(8, dtype=torch.float64)
    sigmoid_gate, hard, everywhere = (Gate(kind)(encodings, mask, target) for kind in ("sigmoid", "hard", "global"))
    assert torch.equal(hard, mask.double())
    assert torch.equal(sigmoid_gate, everywhere * mask)
    assert (everywhere > 0).all() and (everywhere < 1).all()


def test_half_precision_encodings_give_a_float32_gate(encodings, mask):
    target = torch.randn(8)
    gates = Gate()(encodings.bfloat16(), mask, target)
    assert gates.dtype == torch.float32
    assert torch.equal(gates, Gate()(encodings.bfloat16().float(), mask, target))


@pytest.mark.parametrize("arguments", [{"kind": "soft"}, {"tau": 0.0}, {"tau": -1.0}, {"tau": float("nan")}])
def test_unusable_gates_are_errors(arguments):
    with pytest.raises(ValueError):
        Gate(**arguments)


def test_a_target_without_energy_is_an_error(encodings, mask):
    with pytest.raises(ValueError, match="above 0"):
        Gate()(encodings, mask, torch.zeros(8))


def test_another_gate_keeps_what_is_not_given():
    assert Gate("global", 0.75, 0.1).replace(beta=0.7) == Gate("global", 0.7, 0.1)
    assert Gate("global", 0.75, 0.1).replace("hard", tau=0.2) == Gate("hard", 0.75, 0.2)
    assert Gate().replace() == Gate()


def test_target_input_is_the_mean_over_prompts(sd):
    templates, noun = ["a photo of a {}", "{} and {}", "the {} outside"], "stuffed animal"
    means = []
    for template in templates:
        prompt, mask = concept_mask(sd.text.tokenizer, template, noun)
        means.append(sd.text([prompt])[0, mask].mean(0))
    torch.testing.assert_close(target_input(sd.text, Word(noun, tuple(templates))), torch.stack(means).mean(0))


@pytest.mark.parametrize("templates", [[], ["a photo of a cat"]])
def test_target_input_needs_the_concept(sd, templates):
    with pytest.raises(ValueError):
        target_input(sd.text, Word("cat", tuple(templates)))


def test_fingerprint():
    assert fingerprint(None) == "identity"
    assert fingerprint(torch.eye(3)) == fingerprint(torch.eye(3, dtype=torch.float64)) != fingerprint(2 * torch.eye(3))
