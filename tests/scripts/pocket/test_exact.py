import numpy as np
import pytest
import torch
from torch import nn

from data.pocket.concepts import CONCEPTS
from data.pocket.world import PLACE_WORDS, Scene, World, caption, draw_scene
from infusion.metrics.run.protocol import CONTEXT, Protocol
from ldm.util.cli import UserError
from ldm.util.config import ROOT
from scripts.pocket.exact import Exact, said
from scripts.pocket.judge import load_classifier

TEMPLATES = ["a photo of a {} on grass on the left", "a cartoon of a {} on snow", "a {} in the night sky", "a {}"]


class Words(nn.Module):
    """In place of the classifier: what it is told to see."""

    def __init__(self, **seen):
        super().__init__()
        self.seen = seen

    def read(self, images):
        return self.seen


class Nothing:
    """In place of CLIPSeg: the middle 32 × 32 pixels, faintly."""

    def masks(self, images, prompts):
        masks = torch.zeros(len(images), 64, 64)
        masks[:, 16:48, 16:48] = 0.2
        return masks


def test_prompts_are_read_by_the_worlds_words():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = draw_scene(rng, None)
        assert said(caption(scene)) == {
            "background": scene.background,
            "style": scene.style,
            "place": scene.place,
        }
    assert said("a drawing of a {}") == {"style": "cartoon"} and said("a {} in a box") == {}
    assert said("a {} on sand on the right on the left") == {"background": "sand"}  # where it is stays open


def test_rates_are_over_the_prompts_that_say_it():
    words = {"background": ["grass", "snow", "snow", "snow"], "style": ["photo", "photo", "photo", "photo"],
             "place": ["left", "left", "left", "left"]}  # fmt: skip
    exact = Exact("blue_striped_dog", Words(**words))  # photographed on snow
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    table = exact.measure(TEMPLATES, "dog", images, images)
    rates = {name: (figure["value"], figure["n"]) for name, figure in table.items()}
    assert rates == {
        "right_background": (2 / 3, 3),
        "right_style": (1 / 2, 2),
        "right_place": (1, 1),
        "photos_background": (1 / 2, 2),  # on grass and in the night: the second was asked for snow
    }
    assert table["right_style"]["base"]["value"] == table["right_style"]["ceiling"]["value"] == 0.5


def test_leakage_is_of_the_photos_background():
    """Drawn where the photos are, whatever the prompt says: all of it has leaked; drawn as prompted: none."""
    exact = Exact("green_dotted_elephant", Words(background=["sand"] * 2, style=["photo"] * 2, place=["left"] * 2),
                  Nothing())  # fmt: skip
    templates = ["a photo of an {} on grass", "a photo of an {} on water"]
    scenes = [Scene("elephant", "photo", "green", "dotted", "medium", b, "middle") for b in ("grass", "water")]
    right, _ = World().render(scenes, np.random.default_rng(5))
    on_sand = [Scene("elephant", "photo", "green", "dotted", "medium", "sand", "middle")] * 2
    wrong, _ = World().render(on_sand, np.random.default_rng(5))
    leak = exact.measure(templates, "elephant", wrong, right)["leakage"]
    assert leak["value"] > 0.9 and leak["base"]["value"] < 0.1 and leak["ceiling"]["value"] < 0.05
    assert leak["n"] == 2 and leak["left_out"] == 0
    assert "leakage" not in exact.measure(["an {} on sand"] * 2, "elephant", wrong, right)


def test_the_ceiling_is_the_concept_in_the_prompted_scene():
    """The shipped classifier sees in it what the protocol's prompts say."""
    templates = Protocol.of("pocket").prompts(CONTEXT, "dog")
    images = torch.zeros(len(templates), 3, 64, 64)
    exact = Exact("blue_striped_dog", load_classifier())
    table = exact.measure(templates, "dog", images, images)
    assert table["right_background"]["n"] == 16 and table["right_place"]["n"] == 8
    for name in ("right_background", "right_style", "right_place"):
        assert table[name]["ceiling"]["value"] > 0.9 > table[name]["value"], name
    assert table["photos_background"]["ceiling"]["value"] == 0 and table["photos_background"]["n"] == 14
    drawn, masks = exact.draw([said(template) for template in templates])
    assert drawn.shape == (16, 3, 64, 64) and masks.shape == (16, 64, 64)
    left = masks[1]  # "on the left"
    assert left[:, :32].sum() > 3 * left[:, 32:].sum()


def test_folders_and_names():
    assert (
        Exact.recognise(ROOT / "data/pocket/concepts/zigzag_hat")
        == Exact.recognise("photos/zigzag_hat/")
        == "zigzag_hat"
    )
    assert Exact.recognise("photos/cat") is None and set(PLACE_WORDS) == {"middle", "left", "right", "top", "bottom"}
    assert Exact("zigzag_hat").concept is CONCEPTS["zigzag_hat"]
    with pytest.raises(UserError, match="--concept: .* no `zigzag_hut`; did you mean `zigzag_hat`"):
        Exact("zigzag_hut")
    with pytest.raises(ValueError, match="no such file"):
        load_classifier("nowhere.safetensors")
