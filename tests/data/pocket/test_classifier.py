import numpy as np
import pytest
import torch

from data.pocket.classifier import ClassifierTraining, SceneClassifier
from data.pocket.module import labels
from data.pocket.world import CHOICES, World, draw_scene
from scripts.pocket.evaluate import rates


@pytest.fixture
def classifier() -> SceneClassifier:
    torch.manual_seed(0)
    return SceneClassifier(widths=(4, 8, 8, 8))


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(16)]
    return scenes, World().render(scenes, rng)[0]


def test_a_head_for_every_part_of_a_scene(classifier, drawn):
    logits = classifier(drawn[1])
    assert {name: value.shape for name, value in logits.items()} == {
        name: (16, len(words)) for name, words in CHOICES.items()
    }


def test_reading_does_not_depend_on_the_rest_of_the_batch(classifier, drawn):
    together = classifier.train().read(drawn[1])
    alone = [classifier.read(image[None]) for image in drawn[1]]
    assert together == {name: [reading[name][0] for reading in alone] for name in CHOICES}


def test_it_learns_what_it_is_shown(classifier, drawn):
    """Sixteen scenes are learned by heart; the figures then say so."""
    scenes, images = drawn
    module = ClassifierTraining(classifier)
    module.log_dict = lambda values, **options: None
    optimizer = torch.optim.AdamW(classifier.parameters(), 1e-2)
    batch = {"images": images * 2 - 1, "labels": labels(scenes)}
    before = rates(classifier, images, scenes)
    for _ in range(150):
        classifier.train()
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    after = rates(classifier, images, scenes)
    assert min(after.values()) > 0.8 and before["noun"] < 0.3


def test_rates_are_shares_of_scenes_read_rightly(drawn):
    scenes, images = drawn

    class Reader:
        def read(self, images):
            wrong = [CHOICES["noun"][0] if s.noun != CHOICES["noun"][0] else CHOICES["noun"][1] for s in scenes[:4]]
            return {name: [getattr(s, name) for s in scenes] for name in CHOICES} | {
                "noun": wrong + [s.noun for s in scenes[4:]]
            }

    figures = rates(Reader(), images, scenes)
    assert figures.pop("noun") == 0.75 and set(figures.values()) == {1.0}
