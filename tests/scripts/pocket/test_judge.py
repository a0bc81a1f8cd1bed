import pytest
import torch
from torch import nn

from data.pocket.concepts import CONCEPTS
from scripts.pocket.judge import Judge, contexts, difference, drawn, mean, rate


class Colours(nn.Module):
    """In place of CLIP: an image's mean colour, at unit length."""

    def image_features(self, images):
        return nn.functional.normalize(images.mean((2, 3)), dim=1)


class Words(nn.Module):
    """In place of the classifier: what it is told to see."""

    def __init__(self, **seen):
        super().__init__()
        self.seen = seen

    def read(self, images):
        return {name: words[: len(images)] for name, words in self.seen.items()}


def plain(*colours):
    return torch.tensor(colours, dtype=torch.float32)[:, :, None, None].expand(-1, 3, 4, 4)


RED, GREEN, BLUE = (1, 0, 0), (0, 1, 0), (0, 0, 1)


def test_contexts_are_all_but_that_of_the_photos():
    for name, concept in CONCEPTS.items():
        places = contexts(concept)
        assert len({place.template for place in places}) == 14, name
        assert {place.scene.background for place in places}.isdisjoint({concept.background})
        assert {place.scene.noun for place in places} == {concept.noun}
    assert contexts(CONCEPTS["green_dotted_elephant"])[0].template == "a photo of a {} on grass"
    assert contexts(CONCEPTS["zigzag_hat"])[1].template == "a cartoon of a {} on grass"
    assert [place.scene.style for place in places[:4]] == ["photo", "cartoon", "photo", "cartoon"]


def test_similarity_is_the_mean_cosine():
    judge = Judge(Colours(), Words())
    photos = plain(RED, RED, GREEN, GREEN)
    assert judge.similarities(plain(RED, BLUE, (1, 1, 0)), photos).tolist() == pytest.approx([0.5, 0, 0.5**0.5])
    assert judge.among(plain(RED, RED, GREEN)).tolist() == pytest.approx([0.5, 0.5, 0])


def test_what_is_right():
    concept = CONCEPTS["blue_striped_dog"]  # photographed on snow
    places = contexts(concept)[:3]  # photo on grass, cartoon on grass, photo on sand
    judge = Judge(Colours(), Words(background=["grass", "snow", "grass"], style=["photo", "photo", "photo"],
                                   colour=["blue", "red", "natural"], pattern=["striped"] * 3))  # fmt: skip
    assert judge.right(plain(RED, RED, RED), concept, places) == {
        "background": [True, False, False],
        "style": [True, False, True],
        "colour": [True, False, False],
        "pattern": [True, True, True],
        "photos_background": [False, True, False],
    }
    seen = {"background": ["grass"], "style": ["photo"], "colour": ["orange"], "pattern": ["plain"]}
    for name in ("two_colour_teapot", "other_fish"):  # of two colours, and of the drawing's own
        right = Judge(Colours(), Words(**seen)).right(plain(RED), CONCEPTS[name], contexts(CONCEPTS[name])[:1])
        assert set(right) == {"background", "style", "photos_background"}


def test_figures_with_their_errors():
    assert mean([1.0, 2.0, 3.0]) == {"value": 2.0, "stderr": pytest.approx(1 / 3**0.5), "n": 3}
    assert mean([4.0]) == {"value": 4.0, "stderr": None, "n": 1}
    assert difference([1.0, 5.0], [2.0, 6.0]) == {"value": 1.0, "stderr": 0.0, "n": 2}
    assert difference([True, False], [True, True])["value"] == 0.5
    assert rate([True, False]) == {"value": 0.5, "stderr": pytest.approx((0.25 / 6) ** 0.5), "n": 2}
    sure = rate([True] * 32)
    assert sure["value"] == 1.0 and sure["stderr"] == pytest.approx((34 / 36 * 2 / 36 / 36) ** 0.5)


def test_measure_compares_with_the_concept_really_drawn():
    concept = CONCEPTS["other_backpack"]
    places = contexts(concept)
    real = drawn(concept, places)
    assert real.shape == (14, 3, 64, 64) and torch.equal(real, drawn(concept, places))
    words = Words(background=[place.scene.background for place in places], style=["photo"] * 14)
    table = Judge(Colours(), words).measure(concept, places, plain(RED, RED), plain(*[GREEN] * 14), plain(*[RED] * 14))
    likeness = {name: figure["value"] for name, figure in table["similarity"].items()}
    assert likeness["base"] == 0 and likeness["infusion"] == likeness["photos"] == likeness["difference"] == 1
    assert 0.4 < likeness["drawn"] < 1
    assert table["background"]["infusion"]["value"] == 1 and table["style"]["base"]["value"] == 0.5
    assert table["style"]["difference"]["value"] == table["photos_background"]["drawn"]["value"] == 0


def test_load_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        Judge.load(clip_weights=tmp_path / "clip.safetensors")
    (tmp_path / "clip.yaml").write_text("other: {}\n")
    with pytest.raises(ValueError, match="has no node `clip`"):
        Judge.load(clip_config=tmp_path / "clip.yaml")
