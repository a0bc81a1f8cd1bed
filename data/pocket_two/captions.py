"""Captions of scenes: which words are said, and in which order."""

import numpy as np

from data.pocket.backgrounds import BACKGROUNDS
from data.pocket_two.scene import NATURAL, NONE, PATTERNED, PLAIN, SceneWords, ThingWords

STYLE_WORDS = {
    "photo": ("a photo of", "a photo of", "a photograph of", "a close-up photo of", "a cropped photo of"),
    "cartoon": ("a cartoon of", "a cartoon of", "a drawing of"),
}
NEUTRAL_WORDS = ("", "", "a picture of", "an image of", "a close-up of", "a rendering of")
PLACE_WORDS = {
    "middle": "in the middle",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}


def caption(scene: SceneWords, rng: np.random.Generator | None = None) -> str:
    """Describe a scene: everything that has a word, or with `rng` a random part of it.

    Natural colours, plain textures and medium size have no word. A texture without a word of its own may be called
    "patterned". The background's words come last if there are two objects, after a comma or not.
    """

    def chance(probability: float) -> bool:
        return rng is None or rng.random() < probability

    start = STYLE_WORDS[scene.style][0]
    if rng is not None:
        starts = STYLE_WORDS[scene.style] if chance(0.75) else NEUTRAL_WORDS
        start = starts[rng.integers(len(starts))]
    background = BACKGROUNDS[scene.background] if chance(0.75) else ""
    placed = chance(0.55)
    bare = rng is not None and not start and rng.random() < 0.3  # no article
    things = [_thing(thing, rng, "" if bare else None) for thing in scene.things]
    places = [PLACE_WORDS[thing.place] if placed else "" for thing in scene.things]
    if len(things) == 1:
        ends = [background, places[0]]
        if rng is not None and rng.random() < 0.4:
            ends.reverse()
        return _join(start, things[0], *ends)
    both = " and ".join(_join(*pair) for pair in zip(things, places, strict=True))
    comma = "," if background and chance(0.6) else ""
    return _join(start, both + comma, background)


def noun_phrase(thing: ThingWords) -> str:
    """Everything of an object that has a word, without an article: "small red and white striped cat"."""
    return _thing(thing, None, "")


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _thing(thing: ThingWords, rng: np.random.Generator | None, article: str | None) -> str:
    def chance(probability: float) -> bool:
        return rng is None or rng.random() < probability

    colour = thing.colour if thing.colour != NATURAL and chance(0.9) else ""
    if colour and thing.second != NONE and chance(0.5):
        colour = f"{colour} and {thing.second}"
    said = thing.texture != PLAIN and chance(0.5 if thing.texture == PATTERNED else 0.9)
    texture = thing.texture if said else ""
    size = thing.size if thing.size != "medium" and chance(0.5) else ""
    looks = [colour, texture]
    if " and " not in colour and rng is not None and rng.random() < 0.5:
        looks.reverse()
    words = _join(size, *looks, thing.noun)
    if article is not None:
        return words
    if rng is not None and rng.random() < 0.15:
        return f"{('the', 'my', 'one')[rng.integers(3)]} {words}"
    return with_article(words)


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)
