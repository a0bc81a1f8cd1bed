"""The concepts of the pocket world: objects held out of it, each in five pictures of one context.

    python -m data.pocket_two.concepts        # draws their photos and masks anew

Level 1 is a control: a combination that training never shows, but words can say. Level 2 has a texture that no word
says: an overlay of two kinds that training never overlays. Level 3 is a shape of a drawing set that training never
shows. Concepts of `TUNING` are for choosing recipes, and take no part in comparisons.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from data.pocket_two.captions import noun_phrase, with_article
from data.pocket_two.scene import Placed, Scene, Thing
from data.pocket_two.textures import Texture
from data.pocket_two.world import World, to_images

FOLDER = Path(__file__).with_name("concepts")
LAYOUT = (("large", "middle"), ("medium", "left"), ("medium", "right"), ("large", "bottom"), ("medium", "top"))


@dataclass(frozen=True)
class PocketConcept:
    """An object, and the background of its photos. `level`: 1 to 3."""

    level: int
    thing: Thing
    background: str
    words: str = ""  # how the concept is best told in words; everything that has a word if empty

    def scenes(self) -> list[Scene]:
        return [Scene("photo", self.background, (Placed(self.thing, size, place),)) for size, place in LAYOUT]

    @property
    def described(self) -> str:
        """The concept in words: "a turquoise and white striped dog"."""
        return with_article(self.words or noun_phrase(Placed(self.thing).words()))


def _thing(noun: str, first: str, second: str, *textures: Texture) -> Thing:
    return Thing(noun, "fluent", first, second, textures)


COMPARED = {
    "striped_fish": PocketConcept(
        1, _thing("fish", "orange", "white", Texture("striped", 0.3, 3.4, (0.1, 0.0))), "water"
    ),
    "zigzag_cat": PocketConcept(1, _thing("cat", "orange", "black", Texture("zigzag", 1.57, 3.2, (0.0, 0.3))), "snow"),
    "dotted_frog": PocketConcept(
        1, _thing("frog", "yellow", "purple", Texture("dotted", 0.6, 3.5, (0.2, 0.3))), "sand"
    ),
    "halved_teapot": PocketConcept(1, _thing("teapot", "yellow", "blue", Texture("halved", 1.57, 1.0)), "wood"),
    "target_car": PocketConcept(
        2,
        _thing("car", "red", "white", Texture("ringed", 0.0, 3.4, (0.2, 0.2)), Texture("rayed", 0.0, 5.0)),
        "snow",
    ),
    "swapped_backpack": PocketConcept(
        2,
        _thing("backpack", "blue", "orange", Texture("striped", 0.0, 3.2), Texture("halved", 1.57, 1.0)),
        "bricks",
    ),
    "split_elephant": PocketConcept(
        2,
        _thing("elephant", "blue", "yellow", Texture("dotted", 0.8, 3.1, (0.1, 0.3)), Texture("halved", 1.3, 1.0)),
        "grass",
    ),
    "beaded_hat": PocketConcept(
        2,
        _thing(
            "hat",
            "purple",
            "yellow",
            Texture("dotted", 0.8, 3.2, (0.3, 0.0), -1.0),
            Texture("striped", 0.0, 3.4, (0.25, 0.0)),
        ),
        "fabric",
    ),
    "other_rabbit": PocketConcept(3, Thing("rabbit", "twemoji"), "wood"),
    "other_snail": PocketConcept(3, Thing("snail", "twemoji"), "night"),
    "other_boot": PocketConcept(3, Thing("boot", "twemoji"), "sand"),
    "other_butterfly": PocketConcept(3, Thing("butterfly", "twemoji"), "bricks"),
}
TUNING = {
    "gridded_duck": PocketConcept(
        1, _thing("duck", "orange", "blue", Texture("gridded", 0.7, 2.9, (0.1, 0.1))), "grass"
    ),
    "split_owl": PocketConcept(
        2,
        _thing("owl", "turquoise", "red", Texture("zigzag", 1.57, 3.2, (0.0, 0.3)), Texture("halved", 1.57, 1.0)),
        "night",
    ),
    "other_dress": PocketConcept(3, Thing("dress", "twemoji"), "snow"),
    "other_horse": PocketConcept(3, Thing("horse", "twemoji"), "fabric"),
}
CONCEPTS = {**COMPARED, **TUNING}


def draw(concept: PocketConcept, world: World, seed: int) -> tuple[Tensor, Tensor]:
    """Five images (5, 3, 64, 64) and masks (5, 1, 64, 64), both in [0, 1]."""
    images, masks = world.render(concept.scenes(), np.random.default_rng(seed))
    return images, masks[:, :1]


def write_concepts(folder: Path) -> None:
    """Write `<folder>/<name>/0.png …` and `<folder>/<name>/mask/0.png …`."""
    world = World()
    for seed, (name, concept) in enumerate(CONCEPTS.items()):
        images, masks = draw(concept, world, seed)
        (folder / name / "mask").mkdir(parents=True, exist_ok=True)
        for i, (image, mask) in enumerate(zip(to_images(images), to_images(masks.expand(-1, 3, -1, -1)), strict=True)):
            image.save(folder / name / f"{i}.png", optimize=True)
            mask.convert("L").save(folder / name / "mask" / f"{i}.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write (default: %(default)s)")
    write_concepts(parser.parse_args().out)
