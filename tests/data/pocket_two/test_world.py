from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data.pocket.backgrounds import BACKGROUNDS
from data.pocket_two.captions import caption
from data.pocket_two.concepts import COMPARED, CONCEPTS, FOLDER, TUNING, draw
from data.pocket_two.scene import (
    COLOURS,
    NONE,
    NOUNS,
    PATTERNED,
    PLACES,
    SIZES,
    STYLES,
    TEXTURES,
    Placed,
    Scene,
    Thing,
)
from data.pocket_two.textures import WORDS, Texture, draw_texture, fields, overlay
from data.pocket_two.world import HELD_OVERLAYS, SIZE, World, draw_scene, untrained
from ldm.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(0)
    return [draw_scene(rng) for _ in range(2000)]


def alone(thing: Thing, style: str = "photo", background: str = "snow", **placed) -> Scene:
    return Scene(style, background, (Placed(thing, **placed),))


def centre_of(mask: torch.Tensor) -> tuple[float, float]:
    line = torch.arange(SIZE) + 0.5
    return float((mask.sum(0) * line).sum() / mask.sum()), float((mask.sum(1) * line).sum() / mask.sum())


def test_the_world_is_as_large_as_promised(scenes):
    assert len(set(NOUNS)) == 36 and len(STYLES) == 2 and len(BACKGROUNDS) == 8 and len(COLOURS) == 11
    assert len(WORDS) == 10
    counts = Counter(len(scene.things) for scene in scenes)
    assert 0.33 < counts[2] / len(scenes) < 0.45
    seen = Counter(placed.thing.texture for scene in scenes for placed in scene.things)
    assert set(seen) == set(TEXTURES)


def test_training_scenes_never_have_what_is_kept_from_them(scenes):
    assert not any(untrained(scene.words()) for scene in scenes)
    things = [placed.thing for scene in scenes for placed in scene.things]
    assert {thing.drawing for thing in things} == {"fluent", "noto"}
    overlays = [{texture.kind for texture in thing.textures} for thing in things if len(thing.textures) == 2]
    assert len(overlays) > 50 and not any(kinds in HELD_OVERLAYS for kinds in overlays)


def test_each_part_alone_is_trained(scenes):
    things = [placed.thing for scene in scenes for placed in scene.things]
    assert {thing.noun for thing in things} == set(NOUNS)
    assert {thing.colour for thing in things} >= set(COLOURS)


def test_scenes_that_are_asked_for_have_an_untrained_combination():
    rng = np.random.default_rng(1)
    assert all(untrained(draw_scene(rng, untrained_ones=True).words()) for _ in range(200))


def test_two_objects_have_two_nouns(scenes):
    pairs = [scene.things for scene in scenes if len(scene.things) == 2]
    assert all(first.thing.noun != second.thing.noun for first, second in pairs)


# --- concepts -------------------------------------------------------------------------------------------------------


def test_there_are_four_concepts_of_each_level_to_compare_and_four_to_tune():
    assert Counter(concept.level for concept in COMPARED.values()) == {1: 4, 2: 4, 3: 4}
    assert len(TUNING) == 4 and {concept.level for concept in TUNING.values()} == {1, 2, 3}
    nouns = [concept.thing.noun for concept in CONCEPTS.values()]
    assert len(set(nouns)) == len(nouns)


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_concept_is_new_in_the_way_of_its_level(name):
    concept = CONCEPTS[name]
    (scene, *_), thing = concept.scenes(), concept.thing
    if concept.level == 1:  # words say everything, and training never shows it
        assert thing.texture in WORDS and untrained(scene.words())
        assert all(word in concept.described for word in (thing.noun, thing.colour, thing.second, thing.texture))
    elif concept.level == 2:
        assert {texture.kind for texture in thing.textures} in HELD_OVERLAYS and thing.texture == PATTERNED
    else:
        assert thing.drawing == "twemoji"


@pytest.mark.parametrize("name", CONCEPTS)
def test_the_photos_in_the_repository_are_those_that_the_world_draws(name, world):
    images, masks = draw(CONCEPTS[name], world, list(CONCEPTS).index(name))
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        photo = torch.from_numpy(np.array(Image.open(FOLDER / name / f"{i}.png"))).permute(2, 0, 1) / 255
        drawn = torch.from_numpy(np.array(Image.open(FOLDER / name / "mask" / f"{i}.png"))) / 255
        assert (photo - image).abs().max() < 0.01 and (drawn - mask[0]).abs().max() < 0.01


# --- captions -------------------------------------------------------------------------------------------------------


def test_a_whole_caption_says_everything_that_has_a_word():
    striped = Thing("cat", "fluent", "red", "white", (Texture("striped", 0.0, 3.0),))
    one = Scene("photo", "grass", (Placed(striped, "small", "left"),))
    assert caption(one.words()) == "a photo of a small red and white striped cat on grass on the left"
    teapot = Placed(Thing("teapot", "fluent", "blue"), "medium", "right")
    two = Scene("cartoon", "grass", (Placed(replace(striped, textures=(), second=NONE), "medium", "left"), teapot))
    assert caption(two.words()) == "a cartoon of a red cat on the left and a blue teapot on the right, on grass"
    owl = Scene("photo", "sand", (Placed(Thing("owl", colour="orange")),))
    assert caption(owl.words()) == "a photo of an orange owl on sand in the middle"


def test_random_captions_always_name_every_noun(scenes):
    rng = np.random.default_rng(2)
    for scene in scenes[:500]:
        words = caption(scene.words(), rng).replace(",", "").split()
        assert all(placed.thing.noun in words for placed in scene.things)


def test_no_caption_is_cut_by_the_tokenizer(scenes):
    tokenizer = Tokenizer(merges=10000, context_length=48, pad="end")
    longest = max(len(tokenizer.encode(caption(scene.words()))) for scene in scenes)
    assert longest <= 46


# --- drawing --------------------------------------------------------------------------------------------------------


def test_a_scene_depends_on_its_seed_alone(world, scenes):
    first = world.render(scenes[:8], np.random.default_rng(3))
    again = world.render(scenes[:8], np.random.default_rng(3))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_objects_stand_where_their_words_say(world):
    rng = np.random.default_rng(4)
    for place, (x, y) in PLACES.items():
        _, masks = world.render([alone(Thing("apple"), size="small", place=place)] * 20, rng)
        for mask in masks[:, 0]:
            found = [round((c - SIZE / 2) / 13) for c in centre_of(mask)]
            assert (found[0] == x if x else abs(found[0]) <= 1) and (found[1] == y if y else abs(found[1]) <= 1)


def test_sizes_are_told_apart(world):
    rng = np.random.default_rng(5)
    areas = [
        world.render([alone(Thing("apple"), size=size)] * 20, rng)[1][:, 0].sum((1, 2)).sort().values for size in SIZES
    ]
    assert areas[0][-1] < areas[1][0] and areas[1][-1] < areas[2][0]


def test_most_objects_are_whole_and_two_never_hide_each_other(world, scenes):
    _, masks = world.render(scenes[:600], np.random.default_rng(6))
    pairs = torch.tensor([len(scene.things) == 2 for scene in scenes[:600]])
    assert (masks[~pairs, 1] == 0).all()
    edge = torch.cat([masks[:, :, 0], masks[:, :, -1], masks[..., 0], masks[..., -1]], -1).amax((1, 2))
    assert (edge < 0.5).float().mean() >= 0.8
    both = masks[pairs]
    assert (both[:, 0].bool() & both[:, 1].bool()).float().sum((1, 2)).median() < 20  # pixels


def test_colours_are_those_that_were_asked_for(world):
    for name, value in COLOURS.items():
        sprite = world.dye([Thing("shirt", "noto", name)])[0]
        inside = sprite[3] > 0.99
        mean = (sprite[:3, inside]).mean(1)
        nearest = min(COLOURS, key=lambda other: float((mean - torch.tensor(COLOURS[other])).norm()))
        assert nearest == name, (name, mean, value)


def test_features_of_a_drawing_show_through_a_texture(world):
    plain = world.dye([Thing("cat", "noto", "yellow")])[0]
    striped = world.dye([Thing("cat", "noto", "yellow", "white", (Texture("striped", 0.0, 3.0),))])[0]
    dark = (plain[:3].sum(0) < 0.9) & (plain[3] > 0.99)  # eyes, nose, mouth
    assert dark.sum() > 20
    assert striped[:3, dark].sum(0).mean() < 0.6 * striped[:3, (plain[3] > 0.99) & ~dark].sum(0).mean()


# --- textures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*WORDS, "waves"])
def test_a_texture_has_both_colours(kind):
    rng = np.random.default_rng(7)
    field = fields([draw_texture(rng, kind) for _ in range(20)], 48)
    assert field.shape == (20, 48, 48) and field.min() >= 0 and field.max() <= 1
    share = field.mean((1, 2))
    assert (share > 0.08).all() and (share < 0.92).all()


def test_a_word_says_where_the_colours_are():
    """Which a model learns from noisy pictures; a free texture is not told by the mean of its kind."""
    rng = np.random.default_rng(9)
    means = torch.stack([fields([draw_texture(rng, kind) for _ in range(100)], 32).mean(0) for kind in WORDS])

    def told(free: bool) -> float:
        drawn = torch.stack([fields([draw_texture(rng, kind, free) for _ in range(30)], 32) for kind in WORDS])
        nearest = (drawn[:, :, None] - means).square().mean((3, 4)).argmin(2)  # (kinds, 30)
        return (nearest == torch.arange(len(WORDS))[:, None]).float().mean().item()

    assert told(free=False) > 0.75 and told(free=True) < 0.5


def test_textures_of_many_kinds_are_those_of_each_alone():
    rng = np.random.default_rng(8)
    textures = [draw_texture(rng, kind) for kind in [*WORDS, "waves"]]
    together = fields(textures, 32)
    assert torch.equal(together, torch.cat([fields([texture], 32) for texture in textures]))


def test_stripes_have_the_angle_and_frequency_that_they_are_given():
    (field,) = fields([Texture("striped", 0.0, 4.0)], 64)
    assert torch.allclose(field, field[:1].expand_as(field))  # constant along y
    assert int((field[0].diff().abs() > 0.2).sum()) >= 8  # four stripes have eight edges
    (turned,) = fields([Texture("striped", np.pi / 2, 4.0)], 64)
    torch.testing.assert_close(turned, field.T, atol=1e-4, rtol=0)


def test_an_overlay_swaps_colours():
    field = torch.tensor([0.0, 1.0, 0.3])
    assert torch.equal(overlay(field, torch.zeros(3)), field)
    torch.testing.assert_close(overlay(field, torch.ones(3)), 1 - field)
