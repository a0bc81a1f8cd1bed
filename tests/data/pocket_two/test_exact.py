from dataclasses import replace

import numpy as np
import pytest
import torch

from data.pocket_two.concepts import CONCEPTS
from data.pocket_two.exact import Drawing, cut_out, palette
from data.pocket_two.identity import Identity, IdentityFeatures, elsewhere, mush
from data.pocket_two.judge import SceneReader
from data.pocket_two.scene import NOUNS, Placed, Scene, Thing
from data.pocket_two.world import World
from infusion.metrics.run.features import Backbone, NounReader

COUNT = 12
LOOKS = ("silhouette", "colour", "texture")
TEXTURED = [name for name, concept in CONCEPTS.items() if concept.thing.textures]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def pictures(world, things, seed=0):
    rng = np.random.default_rng(seed)
    images, masks = world.render([elsewhere(thing, rng) for thing in things], rng)
    return images, masks[:, 0]


def looks(drawing, images, masks):
    return {look: getattr(drawing, look)(images, masks).mean().item() for look in LOOKS}


@pytest.mark.parametrize("name", CONCEPTS)
def test_exact_looks_know_the_concept_from_what_is_not_it(world, name):
    thing = CONCEPTS[name].thing
    drawing, rng = Drawing(thing), np.random.default_rng(1)
    own = looks(drawing, *pictures(world, [thing] * COUNT))
    assert own["silhouette"] > 0.85 and own["colour"] > 0.7 and own["texture"] > 0.6
    others = [replace(thing, noun=str(noun)) for noun in rng.choice([n for n in NOUNS if n != thing.noun], COUNT)]
    assert own["silhouette"] > looks(drawing, *pictures(world, others))["silhouette"] + 0.1
    images, masks = pictures(world, [thing] * COUNT)
    shuffled, averaged, hue = (looks(drawing, mush(images, masks[:, None], rng, way), masks) for way in range(3))
    assert own["texture"] > max(shuffled["texture"], hue["texture"]) + 0.05 and own["colour"] > hue["colour"] + 0.05
    if thing.textures:  # what has a colour all over keeps it when it is averaged
        assert own["texture"] > averaged["texture"] and own["colour"] > averaged["colour"]


@pytest.mark.parametrize("name", TEXTURED)
def test_a_plain_thing_has_the_colour_but_not_the_texture(world, name):
    thing = CONCEPTS[name].thing
    drawing = Drawing(thing)
    own = looks(drawing, *pictures(world, [thing] * COUNT))
    plain = looks(drawing, *pictures(world, [replace(thing, textures=(), second="none")] * COUNT))
    assert plain["silhouette"] == pytest.approx(own["silhouette"], abs=0.05)
    assert plain["texture"] < own["texture"] - 0.1 and plain["colour"] < own["colour"] - 0.1


def test_objects_are_cut_out_alike_wherever_they_stand(world):
    thing = Thing("cat", colour="red")
    scenes = [Scene("photo", "snow", (Placed(thing, *how),)) for how in (("large", "middle"), ("small", "left"))]
    images, masks = world.render(scenes, np.random.default_rng(0))
    found, cut = cut_out(images, masks[:, 0])
    assert cut.sum((1, 2)) == pytest.approx(32 * 32 / 4, rel=0.05)  # half the square's side is the root of the area
    shares = palette(found, cut)
    assert shares.sum(1) == pytest.approx(1) and (shares[:, 0] > 0.6).all()
    nothing = Drawing(thing).silhouette(images, torch.zeros(2, 64, 64))
    assert nothing.isfinite().all() and nothing.max() < 0.05


def test_identity_and_reader_are_what_a_measure_takes(tmp_path):
    torch.manual_seed(0)
    features, images = IdentityFeatures(Identity()), torch.rand(3, 3, 64, 64)
    assert isinstance(features, Backbone) and features.name == "identity"
    found = features(images)
    assert found.shape == (3, features.width) and torch.allclose(found.norm(dim=1), torch.ones(3), atol=1e-5)
    reader = SceneReader().eval()
    assert isinstance(reader, NounReader)
    read, noun = reader.read(images), None
    assert set(read) == {"style", "background", "noun", "texture", "size", "place"} and len(read["noun"]) == 3
    noun = read["noun"][0]
    assert reader.sees(images, noun)[0] and len(reader.sees(images, noun)) == 3
