import pytest
import torch

from infusion.sampling.generate import Settings, check_prompts, generate
from tests.infusion.sampling.test_customised import make_concept

FAST = Settings(steps=2, scale=3.0)
PROMPTS = ["a photo of a {} outside", "a {} in the rain", "a dog"]


def test_agrees_with_the_pipeline(sd):
    concept = make_concept(sd)
    images, maps = generate(sd, PROMPTS, [5, 6, 7], [concept], FAST)
    assert torch.equal(images, sd.sample(PROMPTS, [concept], steps=2, scale=3.0, seed=5))
    assert maps is None
    plain = ["a cat", "a dog"]
    assert torch.equal(generate(sd, plain, [5, 6], settings=FAST)[0], sd.sample(plain, steps=2, scale=3.0, seed=5))


def test_an_image_depends_on_its_prompt_and_seed_alone(sd):
    concept = make_concept(sd)
    together, maps = generate(sd, PROMPTS, [5, 9, 2], [concept], FAST, map_grid=(4, 4))
    alone, its_map = generate(sd, PROMPTS[1:2], [9], [concept], FAST, map_grid=(4, 4))
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(maps[1:2], its_map, atol=1e-5, rtol=0)
    assert maps.shape == (3, 1, 4, 4) and maps[:2].min() > 0 and not maps[2].any()


def test_strength_beta_and_tau_reach_the_concept(sd):
    concept = make_concept(sd, scale=5.0)
    base = sd.sample(["a cat"], steps=2, scale=3.0, seed=5)
    usual, _ = generate(sd, ["a {}"], [5], [concept], FAST)
    none, _ = generate(sd, ["a {}"], [5], [concept], Settings(steps=2, scale=3.0, strength=0.0))
    closed, _ = generate(sd, ["a {}"], [5], [concept], Settings(steps=2, scale=3.0, beta=9.0, tau=0.01))
    torch.testing.assert_close(none, base, atol=1e-4, rtol=0)
    torch.testing.assert_close(closed, base, atol=1e-4, rtol=0)
    assert (usual - base).abs().max() > 0.01


def test_autocast_is_close_and_leaves_the_gate_alone(sd):
    concept = make_concept(sd, scale=0.1)
    full, maps = generate(sd, ["a {}"], [5], [concept], FAST, map_grid=(4, 4))
    half, rough = generate(
        sd, ["a {}"], [5], [concept], Settings(steps=2, scale=3.0, precision="autocast"), map_grid=(4, 4)
    )
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 0.1
    torch.testing.assert_close(maps, rough, atol=0.02, rtol=0)


def test_prompts_that_cannot_be_drawn_are_refused(sd):
    with pytest.raises(ValueError, match="no concept for {} in the prompt 'a {}'"):
        check_prompts(sd, ["a dog", "a {}"])
    with pytest.raises(ValueError, match="glued"):
        check_prompts(sd, ["a{}"], [make_concept(sd)])
