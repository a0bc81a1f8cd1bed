import json

import pytest
import torch

from data.pocket.world import CHOICES
from scripts.pocket.evaluate_clip import accuracy, main


class Oracle:
    """A CLIP that reads every caption, and of an image its red only."""

    def image_features(self, images):
        return torch.stack([torch.tensor([1.0, 0.0])] * len(images))

    def text_features(self, captions):
        return torch.tensor([[float("red" in text.split()), float("on the left" in text)] for text in captions])


def test_a_clip_that_sees_one_word_finds_that_word_alone():
    found = accuracy(Oracle(), 200, seed=3)
    assert found["colour"] == pytest.approx(0.65 / 9, abs=0.05)  # 35 % natural, red is one of nine words otherwise
    for part in ("noun", "style", "background", "place"):  # all captions alike: the first word is taken
        assert found[part] == pytest.approx(1 / len(CHOICES[part]), abs=0.1)


def test_the_shipped_clip_knows_backgrounds_colours_and_places(capsys):
    main(["--n", "60"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["n"] == 60 and printed["words"]["noun"] == 40
    right = printed["right"]
    assert right["background"] > 0.9 and right["colour"] > 0.9 and right["place"] > 0.9 and right["noun"] > 0.6
