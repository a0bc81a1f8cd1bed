"""The catalogue of pictures that likeness has to rank as eyes do."""

import numpy as np
import pytest
import torch

from data.pocket_two.concepts import CONCEPTS, draw
from data.pocket_two.identity import WEIGHTS, Identity, IdentityFeatures
from data.pocket_two.world import World
from ldm.util.config import find
from scripts.pocket_two.judges import CATALOGUE, catalogue, in_order, likeness_of

COUNT = 16  # pictures of each kind


def test_the_catalogue_is_ranked_as_eyes_rank_it():
    """By the trained network, for every concept; without its weights, what holds of any network holds."""
    there = find(WEIGHTS).is_file()
    torch.manual_seed(0)
    features = IdentityFeatures.load(WEIGHTS) if there else IdentityFeatures(Identity())
    names = list(CONCEPTS) if there else ["zigzag_cat", "other_snail"]
    rng, world = np.random.default_rng(77), World()
    for name in names:
        kinds = catalogue(CONCEPTS[name], lambda images: images, world, rng, COUNT)
        assert set(kinds) == set(CATALOGUE) and all(images.shape == (COUNT, 3, 64, 64) for images in kinds.values())
        if there:
            ranked = likeness_of(features, draw(CONCEPTS[name], world, 0)[0], kinds)
            assert in_order(ranked, CONCEPTS[name].level), (name, ranked)
        else:  # nothing is more like a picture than it is itself, and the same through a perfect autoencoder
            photo = {kind: kinds[kind][:1] for kind in ("elsewhere", "autoencoder")}
            ranked = likeness_of(features, kinds["elsewhere"][:1], kinds | photo)
            assert max(ranked.values()) == pytest.approx(ranked["elsewhere"]) == pytest.approx(1)
            assert ranked["autoencoder"] == pytest.approx(1) and all(ranked[kind] < 1 for kind in ("words", "hue"))


def test_an_order_is_that_of_eyes_or_not():
    right = {"elsewhere": 0.9, "autoencoder": 0.8, "words": 0.6, "noun": 0.4, "other concept": 0.2}
    right |= {"shuffled": 0.3, "averaged": 0.1, "hue": 0.2, "other noun": 0.0}
    assert in_order(right, 1) and in_order(right | {"words": 0.1}, 3)  # whose words are its plain noun
    for wrong in ({"words": 0.85}, {"shuffled": 0.5}, {"other concept": 0.7}, {"autoencoder": 0.5}):
        assert not in_order(right | wrong, 1), wrong
