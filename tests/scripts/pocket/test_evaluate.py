"""The shipped model draws what a prompt names, read by the shipped classifier."""

import numpy as np
import pytest
import torch

from data.pocket.classifier import SceneClassifier
from data.pocket.world import World, caption, draw_scene
from ldm.pipeline import StableDiffusion
from ldm.util.config import ROOT, find
from ldm.weights.checkpoint import load_into
from scripts.pocket.evaluate import rates
from scripts.pocket.judge import CLASSIFIER_WEIGHTS


@pytest.fixture(scope="module")
def classifier() -> SceneClassifier:
    classifier = SceneClassifier()
    load_into({"": classifier}, find(CLASSIFIER_WEIGHTS))
    return classifier.eval()


@pytest.fixture(scope="module")
def scenes() -> list:
    rng = np.random.default_rng(5)
    return [draw_scene(rng, untrained_ones=True) for _ in range(48)]


def test_the_classifier_reads_drawn_scenes_of_untrained_combinations(classifier, scenes):
    images, _ = World().render(scenes, np.random.default_rng(0))
    assert all(share > 0.9 for share in rates(classifier, images, scenes).values())


@torch.no_grad()
def test_samples_are_what_the_prompts_say(classifier, scenes):
    sd = StableDiffusion.from_checkpoint(ROOT / "configs/backbone/pocket.yaml")
    images = sd.sample([caption(scene) for scene in scenes[:24]], steps=12, scale=5.0, seed=0)
    found = rates(classifier, images, scenes[:24])
    assert found["background"] > 0.9 and found["place"] > 0.8 and found["style"] > 0.8 and found["noun"] > 0.6
