import numpy as np
import pytest
import torch

from data.pocket.prompted import PromptedBatches, bend, draw_batch, perturb, prompt, repaint, textures
from data.pocket.world import NOUNS, World, draw_scene


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def batch(world) -> dict:
    return draw_batch(world, np.random.default_rng(0), 64)


def nouns(text: str) -> set[str]:
    return set(text.split()) & set(NOUNS)


def test_shapes_and_ranges(batch):
    assert batch["images"].shape == (64, 3, 64, 64) and batch["masks"].shape == (64, 2, 64, 64)
    assert -1 <= batch["images"].min() < -0.8 and 0.8 < batch["images"].max() <= 1
    assert batch["masks"].min() == 0 and 0.99 < batch["masks"].max() <= 1
    assert [len(prompts) for prompts in batch["prompts"]] == [64, 64]


def test_masks_are_those_of_the_nouns(batch):
    """The same noun has the same mask; of two nouns, the masks do not overlap, or the second's is empty."""
    first, second = ([nouns(text) for text in prompts] for prompts in batch["prompts"])
    assert all(len(words) == 1 for words in first + second)
    same = torch.tensor([one == two for one, two in zip(first, second, strict=True)])
    assert 0.25 < same.float().mean() < 0.55  # 40 % expected
    assert torch.equal(batch["masks"][same, 0], batch["masks"][same, 1])
    assert (batch["masks"][~same].sum(1) < 1.001).all()


def test_some_second_prompts_name_nothing_there_and_some_a_second_object(batch):
    empty = batch["masks"][:, 1].amax((1, 2)) == 0
    assert 0.05 < empty.float().mean() < 0.4  # 20 % expected
    assert batch["masks"][~empty, 1].mean((1, 2)).min() > 0.005


def test_stream_resumes_where_it_stopped():
    def take(count, start=0):
        stream = iter(PromptedBatches(2, seed=3, start=start))
        return [next(stream) for _ in range(count)]

    whole, rest = take(3), take(1, start=2)
    assert whole[2]["prompts"] == rest[0]["prompts"]
    assert torch.equal(whole[2]["images"], rest[0]["images"]) and torch.equal(whole[2]["masks"], rest[0]["masks"])
    assert not torch.equal(whole[0]["images"], whole[1]["images"])


def test_repainting_leaves_the_background(world):
    rng = np.random.default_rng(1)
    images, masks = world.render([draw_scene(rng) for _ in range(16)], rng)
    changed = (repaint(images, masks, rng) - images).abs()
    assert (changed * (masks == 0)).max() < 1e-6
    moved = (changed * masks).sum((1, 2, 3)) / masks.sum((1, 2, 3)) > 0.1
    assert 4 < moved.sum() < 16  # most objects look different, and some stay


def test_bending_moves_image_and_mask_alike():
    mask = torch.zeros(32, 1, 64, 64)
    mask[:, :, 20:36, 10:40] = 1
    images, masks = bend(mask.expand(-1, 3, -1, -1), mask, np.random.default_rng(2))
    torch.testing.assert_close(images, masks.expand(-1, 3, -1, -1))
    moved = (masks - mask).abs().mean((1, 2, 3)) > 0.01
    assert 8 < moved.sum() < 24  # half of them


def test_perturbed_images_stay_images_of_the_same(world):
    rng = np.random.default_rng(3)
    images, _ = world.render([draw_scene(rng) for _ in range(8)], rng)
    other = perturb(images, rng)
    assert other.min() >= 0 and other.max() <= 1 and 0.005 < (other - images).abs().mean() < 0.12


def test_textures_are_of_two_tones_and_many_kinds():
    drawn = textures(np.random.default_rng(4), 64)
    assert drawn.shape == (64, 1, 64, 64) and drawn.min() == 0 and drawn.max() == 1
    share = drawn.mean((1, 2, 3))
    assert (share < 0.95).float().mean() > 0.9 and (share > 0.05).float().mean() > 0.9
    assert ((drawn < 0.1) | (drawn > 0.9)).float().mean() > 0.6
    edges = (drawn.diff(dim=3).abs() > 0.2).float().mean((1, 2, 3))
    assert edges.max() > 1.5 * edges.median() > 3 * edges.min()  # fine and coarse


def test_a_prompt_names_its_scenes_noun():
    rng = np.random.default_rng(5)
    for _ in range(40):
        scene = draw_scene(rng)
        assert nouns(prompt(scene, rng)) == {scene.noun}
