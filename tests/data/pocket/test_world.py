from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from data.pocket.backgrounds import BACKGROUNDS
from data.pocket.concepts import CONCEPTS, FOLDER, draw
from data.pocket.world import (
    CHOICES,
    COLOURS,
    NATURAL,
    NOUNS,
    PATTERNS,
    SIZE,
    STYLES,
    Scene,
    World,
    caption,
    draw_scene,
    untrained,
)
from ldm.models.tokenizer import Tokenizer

CENTRE = {
    "noun": "cat",
    "style": "photo",
    "colour": "red",
    "pattern": "plain",
    "size": "small",
    "background": "snow",
    "place": "middle",
}


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_the_world_is_as_large_as_promised():
    assert len(set(NOUNS)) == 40 and len(STYLES) == 2 and len(BACKGROUNDS) == 8 and len(CHOICES["place"]) == 5
    assert len(COLOURS) >= 8 and len(PATTERNS) >= 3


def test_training_scenes_never_have_an_untrained_combination():
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(3000)]
    assert not any(untrained(scene) for scene in scenes)
    held_out = [draw_scene(rng, untrained_ones=True) for _ in range(300)]
    assert all(untrained(scene) for scene in held_out)
    seen = {(scene.noun, scene.colour) for scene in scenes if scene.colour != NATURAL}
    assert not seen & {
        (s.noun, s.colour)
        for s in held_out
        if untrained(Scene(**{**vars(s), "pattern": "plain"})) and (s.noun, s.colour) not in seen
    }
    assert len(seen) > 0.95 * len(NOUNS) * (len(COLOURS) - 1)


def test_every_noun_lacks_exactly_one_colour():
    for noun in NOUNS:
        lacking = [
            c
            for c in COLOURS
            if all(untrained(Scene(noun, "photo", c, "plain", "small", b, "left")) for b in BACKGROUNDS)
        ]
        assert len(lacking) == 1


def test_no_noun_is_rare():
    rng = np.random.default_rng(1)
    counts = Counter(draw_scene(rng).noun for _ in range(8000))
    assert set(counts) == set(NOUNS) and max(counts.values()) < 2 * min(counts.values())


def test_full_caption_names_every_part():
    scene = Scene("apple", "cartoon", "orange", "striped", "large", "fabric", "left")
    assert caption(scene) == "a cartoon of a large striped orange apple on pink fabric on the left"
    plain = Scene("apple", "photo", NATURAL, "plain", "medium", "wood", "middle")
    assert caption(plain) == "a photo of an apple on a wooden floor in the middle"


def test_random_captions_always_have_the_noun_and_fit_the_text_tower():
    rng, tokenizer = np.random.default_rng(2), Tokenizer(merges=10000, context_length=32)
    for _ in range(500):
        scene = draw_scene(rng)
        words = caption(scene, rng)
        assert scene.noun in words.split()
        assert len(tokenizer.encode(words)) <= 30


def test_same_numbers_same_picture_and_other_numbers_another(world):
    scene = Scene(**CENTRE)
    first, second, third = (world.render([scene], np.random.default_rng(seed))[0] for seed in (5, 5, 6))
    assert torch.equal(first, second)
    assert (first - third).abs().max() > 0.05


@pytest.mark.parametrize(
    ("place", "axis", "sign"), [("left", 1, -1), ("right", 1, 1), ("top", 0, -1), ("bottom", 0, 1)]
)
def test_mask_lies_where_the_caption_says(world, place, axis, sign):
    _, masks = world.render([Scene(**{**CENTRE, "place": place})], np.random.default_rng(0))
    weights = masks[0, 0] / masks.sum()
    ramp = torch.arange(SIZE) - (SIZE - 1) / 2
    centre = [(weights.sum(1) * ramp).sum().item(), (weights.sum(0) * ramp).sum().item()]
    assert sign * centre[axis] > 10 and abs(centre[1 - axis]) < 5


def test_sizes_grow_by_name(world):
    areas = [
        world.render([Scene(**{**CENTRE, "size": s})], np.random.default_rng(0))[1].sum().item()
        for s in CHOICES["size"]
    ]
    assert areas[0] < 0.75 * areas[1] and areas[1] < 0.75 * areas[2]


@pytest.mark.parametrize("colour", ["red", "green", "blue"])
def test_colour_word_is_the_colour_under_the_mask(world, colour):
    images, masks = world.render([Scene(**{**CENTRE, "colour": colour})], np.random.default_rng(0))
    inside = (images * masks).sum((2, 3)) / masks.sum((2, 3))
    assert inside[0].argmax().item() == ["red", "green", "blue"].index(colour)
    assert inside[0].max() > 1.5 * inside[0].median()


def test_images_outside_the_mask_do_not_depend_on_the_object(world):
    red, mask = world.render([Scene(**CENTRE)], np.random.default_rng(3))
    blue, _ = world.render([Scene(**{**CENTRE, "colour": "blue"})], np.random.default_rng(3))
    difference = (red - blue).abs().amax(1, keepdim=True)
    assert difference[mask > 0.9].mean() > 0.2
    assert difference[mask == 0].max() < 1e-6


def test_three_concepts_a_level_each_in_one_context():
    assert Counter(concept.level for concept in CONCEPTS.values()) == {1: 3, 2: 3, 3: 3}
    for concept in CONCEPTS.values():
        scenes = concept.scenes()
        assert len({(s.style, s.background) for s in scenes}) == 1
        assert len({(s.size, s.place) for s in scenes}) == len(scenes) == 5


def test_level_one_is_untrained_and_the_other_levels_cannot_be_drawn_by_the_world():
    for concept in CONCEPTS.values():
        if concept.level == 1:
            neutral = [
                Scene(concept.noun, concept.style, concept.colour, concept.pattern, "small", b, "left")
                for b in BACKGROUNDS
            ]
            assert all(untrained(scene) for scene in neutral)
        elif concept.level == 2:
            assert concept.pattern not in PATTERNS
        else:
            assert concept.drawing not in STYLES


@pytest.mark.parametrize("seed, name", list(enumerate(CONCEPTS)))
def test_shipped_concepts_are_what_the_script_draws(world, seed, name):
    images, masks = draw(CONCEPTS[name], world, seed)
    for i in range(5):
        shipped = np.asarray(Image.open(FOLDER / name / f"{i}.png").convert("RGB"), dtype=float) / 255
        mask = np.asarray(Image.open(FOLDER / name / "mask" / f"{i}.png"), dtype=float) / 255
        assert np.abs(shipped - images[i].permute(1, 2, 0).numpy()).max() < 0.02
        assert np.abs(mask - masks[i, 0].numpy()).max() < 0.02
