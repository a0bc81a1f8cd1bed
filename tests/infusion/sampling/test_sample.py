import pytest
import torch

import infusion
from infusion.sampling.customised import Customised
from infusion.sampling.sample import check_prompts, sample
from infusion.sampling.settings import Settings
from tests.infusion.sampling.test_customised import make_concept

FAST = Settings(steps=2, scale=3.0)
PROMPTS = ["a photo of a {} outside", "a {} in the rain", "a dog"]


def test_without_concepts_it_is_the_pipeline(sd):
    plain = ["a cat", "a dog"]
    expected = sd.sample(plain, steps=2, scale=3.0, seed=5, negative_prompt="fog", height=8, width=24)
    assert torch.equal(sample(sd, plain, (), FAST, seed=5, negative_prompt="fog", height=8, width=24), expected)


def test_settings_may_be_an_object_or_keywords(sd):
    concepts = [make_concept(sd)]
    images = infusion.sample(sd, PROMPTS, concepts, steps=2, scale=3.0, seed=5, strength=0.5)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    assert torch.equal(images, sample(sd, PROMPTS, concepts, FAST, seed=[5, 6, 7], strength=0.5))
    with pytest.raises(TypeError, match="strengths"):
        sample(sd, PROMPTS, concepts, strengths=0.5)


def test_an_image_depends_on_its_prompt_and_seed_alone(sd):
    concepts = [make_concept(sd)]
    together = sample(sd, PROMPTS, concepts, FAST, seed=[5, 9, 2])
    by_two = sample(sd, PROMPTS, concepts, FAST, seed=[5, 9, 2], batch_size=2)
    torch.testing.assert_close(by_two, together, atol=1e-4, rtol=0)
    torch.testing.assert_close(sample(sd, PROMPTS[1:2], concepts, FAST, seed=9), together[1:2], atol=1e-4, rtol=0)


def test_strength_beta_and_tau_reach_the_concept(sd):
    concepts = [make_concept(sd, scale=5.0)]
    base = sd.sample(["a cat"], steps=2, scale=3.0, seed=5)
    usual, none, closed = (
        sample(sd, ["a {}"], concepts, FAST, seed=5, **choices)
        for choices in ({}, {"strength": 0.0}, {"beta": 9.0, "tau": 0.01})
    )
    torch.testing.assert_close(none, base, atol=1e-4, rtol=0)
    torch.testing.assert_close(closed, base, atol=1e-4, rtol=0)
    assert (usual - base).abs().max() > 0.01


def test_autocast_is_close_and_leaves_the_gate_alone(sd, monkeypatch):
    seen = []
    call = Customised.__call__
    monkeypatch.setattr(Customised, "__call__", lambda self, prompts: seen.append(call(self, prompts)) or seen[-1])
    concepts = [make_concept(sd, scale=0.1)]
    full = sample(sd, ["a {}"], concepts, FAST, seed=5)
    half = sample(sd, ["a {}"], concepts, FAST, seed=5, precision="autocast")
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 0.1
    assert torch.equal(seen[0].gates, seen[1].gates)


def test_prompts_that_cannot_be_drawn_are_refused(sd):
    with pytest.raises(ValueError, match="no concept for {} in the prompt 'a {}'"):
        check_prompts(sd, ["a dog", "a {}"])
    with pytest.raises(ValueError, match="glued"):
        check_prompts(sd, ["a{}"], [make_concept(sd)])
    with pytest.raises(ValueError, match="no concept for {1}"):
        sample(sd, ["{1} and {2}"])
