"""What a scene holds, and what can be said of it."""

from dataclasses import dataclass
from typing import NamedTuple

from data.pocket.backgrounds import BACKGROUNDS
from data.pocket_two.textures import WORDS, Texture

NOUNS = ("cat", "dog", "pig", "rabbit", "frog", "horse", "elephant", "penguin", "owl", "duck", "turtle", "fish",
         "whale", "snail", "butterfly", "crab", "apple", "strawberry", "pineapple", "mushroom", "cupcake", "car",
         "rocket", "sailboat", "guitar", "umbrella", "teapot", "crown", "hat", "backpack", "boot", "shirt", "dress",
         "house", "bell", "cactus")  # fmt: skip
STYLES = ("photo", "cartoon")
DRAWINGS = ("fluent", "noto", "twemoji")  # rows of the atlas; Twemoji is never shown by the world
COLOURS = {"red": (0.86, 0.10, 0.12), "orange": (1.0, 0.52, 0.05), "yellow": (0.99, 0.86, 0.12),
           "green": (0.12, 0.60, 0.18), "turquoise": (0.15, 0.78, 0.74), "blue": (0.12, 0.30, 0.90),
           "purple": (0.50, 0.16, 0.74), "pink": (1.0, 0.50, 0.70), "brown": (0.47, 0.27, 0.12),
           "black": (0.13, 0.13, 0.14), "white": (0.96, 0.96, 0.96)}  # fmt: skip
NATURAL = "natural"  # the drawing's own colours; no word
PLAIN = "plain"  # no texture; no word
PATTERNED = "patterned"  # a texture that has no word of its own
TEXTURES = (PLAIN, *WORDS, PATTERNED)
SIZES = {"small": 28, "medium": 36, "large": 45}  # pixels, when the object is alone
PAIR_SIZES = {"small": 23, "medium": 27, "large": 31}  # pixels, beside another
PLACES = {"middle": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
PAIR_PLACES = (("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top"))
NONE = "none"  # no second colour


class ThingWords(NamedTuple):
    """What can be said of one object."""

    noun: str
    colour: str
    second: str
    texture: str
    size: str
    place: str


class SceneWords(NamedTuple):
    """What can be said of a scene."""

    style: str
    background: str
    things: tuple[ThingWords, ...]


@dataclass(frozen=True)
class Thing:
    """An object, wherever it is: what an identity network is to recognise.

    `textures`: none, one field, or two of which the second swaps the colours of the first.
    """

    noun: str
    drawing: str = "fluent"
    colour: str = NATURAL
    second: str = NONE
    textures: tuple[Texture, ...] = ()

    @property
    def texture(self) -> str:
        """The texture's word, of `TEXTURES`."""
        if not self.textures:
            return PLAIN
        single = len(self.textures) == 1 and self.textures[0].kind in WORDS
        return self.textures[0].kind if single else PATTERNED


@dataclass(frozen=True)
class Placed:
    """An object in a scene."""

    thing: Thing
    size: str = "medium"
    place: str = "middle"
    mirrored: bool = False

    def words(self) -> ThingWords:
        thing = self.thing
        return ThingWords(thing.noun, thing.colour, thing.second, thing.texture, self.size, self.place)


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background, in a style."""

    style: str
    background: str
    things: tuple[Placed, ...]

    def words(self) -> SceneWords:
        return SceneWords(self.style, self.background, tuple(placed.words() for placed in self.things))


CHOICES = {"style": STYLES, "background": tuple(BACKGROUNDS), "noun": NOUNS, "colour": (NATURAL, *COLOURS),
           "second": (NONE, *COLOURS), "texture": TEXTURES, "size": tuple(SIZES), "place": tuple(PLACES)}  # fmt: skip
