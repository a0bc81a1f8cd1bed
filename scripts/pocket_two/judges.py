"""Whether the judges of the pocket world can be trusted: on pictures that the world draws, of objects held out of it.

    python -m scripts.pocket_two.judges --sheet catalogue.png        # prints JSON

The reader: how often it reads drawn scenes rightly. The identity network: how often a concept is found again among 50
look-alikes, and for each concept the mean likeness of a catalogue of pictures to the concept's photos. The catalogue is
ranked as eyes rank it: the concept elsewhere, the same through the autoencoder, what its words draw, its plain noun,
and last what is spoiled or another noun in its looks; another concept is below the words.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid, save_image

from data.pocket_two.batches import table_of
from data.pocket_two.concepts import CONCEPTS, PocketConcept, draw
from data.pocket_two.identity import WEIGHTS as IDENTITY
from data.pocket_two.identity import IdentityFeatures, draw_look_alike, elsewhere, mush, tell_again
from data.pocket_two.judge import OBJECT, SCENE, SceneReader, truth_of
from data.pocket_two.scene import NOUNS, Thing
from data.pocket_two.world import World, draw_scene
from ldm.util.cli import Parser, report
from ldm.util.config import find, instantiate, load_config
from ldm.weights.checkpoint import load_into
from scripts.pocket_two.autoencoder import CONFIG, WEIGHTS, reconstruct

FOLDER = "ckpt/pocket_two"
ORDER = ("elsewhere", "autoencoder", "words", "noun", "worst")
SPOILED = ("shuffled", "averaged", "hue", "other noun")
CATALOGUE = (*ORDER[:-1], "other concept", *SPOILED)


@torch.no_grad()
def reading(reader: SceneReader, world: World, count: int, seed: int) -> dict[str, float]:
    """The share of drawn scenes, concepts' drawings and overlays among them, of which each part is read rightly."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng, untrained_ones=None, held=True) for _ in range(count)]
    images, _ = world.render(scenes, rng)
    read = reader(images * 2 - 1)
    labels, there = truth_of(table_of(scenes))
    figures = {name: (read[name].argmax(-1) == labels[name]).float().mean() for name in SCENE}
    figures |= {name: (read[name].argmax(-1) == labels[name])[there].float().mean() for name in OBJECT}
    figures["colours"] = ((read["colours"] > 0) == (labels["colours"] > 0)).all(-1)[there].float().mean()
    return {name: round(float(value), 4) for name, value in figures.items()}


def pictures(things: list[Thing], world: World, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One scene of each object: images (N, 3, 64, 64) in [0, 1], masks (N, 1, 64, 64)."""
    images, masks = world.render([elsewhere(thing, rng) for thing in things], rng)
    return images, masks[:, :1]


def catalogue(
    concept: PocketConcept, through: Callable[[Tensor], Tensor], world: World, rng: np.random.Generator, count: int
) -> dict[str, Tensor]:
    """Pictures (count, 3, 64, 64) in [0, 1] of each kind of `CATALOGUE`, by name.

    Args:
        through: pictures -> the same through the autoencoder.
    """
    thing = concept.thing
    images, masks = pictures([thing] * count, world, rng)
    nouns = [str(noun) for noun in rng.choice([noun for noun in NOUNS if noun != thing.noun], count)]
    others = rng.choice([other.thing for other in CONCEPTS.values() if other.thing.noun != thing.noun], count)
    things = {
        "words": [tell_again(thing, rng) for _ in range(count)],
        "noun": [Thing(thing.noun, str(rng.choice(["fluent", "noto"]))) for _ in range(count)],
        "other concept": list(others),
        "other noun": [replace(thing, noun=noun) for noun in nouns],
    }
    kinds = {"elsewhere": images, "autoencoder": through(images)}
    kinds |= {name: pictures(drawn, world, rng)[0] for name, drawn in things.items()}
    return kinds | {name: mush(images, masks, rng, way) for way, name in enumerate(SPOILED[:3])}


def likeness_of(features: IdentityFeatures, photos: Tensor, kinds: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean likeness of each kind of pictures to photos (P, 3, 64, 64) in [0, 1]."""
    centre = F.normalize(features(photos).mean(0), dim=0)
    return {kind: float((features(images) @ centre).mean()) for kind, images in kinds.items()}


def in_order(likeness: Mapping[str, float], level: int) -> bool:
    """Whether a catalogue of a concept of this level is ranked as eyes rank it."""
    worst = max(likeness[kind] for kind in SPOILED)
    ranks = [likeness[kind] for kind in ORDER[:-1]] + [worst]
    if level == 3:  # its words are its plain noun
        ranks.pop(ORDER.index("words"))
    told = likeness["noun" if level == 3 else "words"]
    return sorted(ranks, reverse=True) == ranks and likeness["other concept"] < told


@report
def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", default=f"{FOLDER}/classifier.safetensors", help="weights of the reader")
    parser.add_argument("--identity", default=IDENTITY, help="weights of the identity network")
    parser.add_argument("--vae", default=None, help="weights of the autoencoder alone; none: the shipped model's")
    parser.add_argument("--n", type=int, default=64, help="pictures of each kind and concept")
    parser.add_argument("--sheet", default=None, help="PNG to write two pictures of each kind and concept to")
    flags = parser.parse_args()

    reader, identity, world = SceneReader().eval(), IdentityFeatures.load(flags.identity), World()
    load_into({"": reader}, find(flags.reader))
    vae = instantiate(load_config([find(CONFIG)]).sd.params.vae)
    load_into({"": vae} if flags.vae else {"first_stage_model.": vae}, find(flags.vae or WEIGHTS))

    rng = np.random.default_rng(77)
    figures, rows = {}, []
    for seed, (name, concept) in enumerate(CONCEPTS.items()):
        photos, _ = draw(concept, world, seed)
        kinds = catalogue(concept, partial(reconstruct, vae), world, rng, flags.n)
        likeness, found = likeness_of(identity, photos, kinds), 0
        for picture in identity(kinds["elsewhere"]):
            rivals, _ = pictures([draw_look_alike(concept.thing, rng) for _ in range(50)], world, rng)
            again, _ = pictures([concept.thing], world, rng)
            found += int((identity(torch.cat([again, rivals])) @ picture).argmax() == 0)
        figures[name] = {kind: round(value, 3) for kind, value in likeness.items()}
        figures[name] |= {"found": round(found / flags.n, 3), "in order": in_order(likeness, concept.level)}
        rows += [kinds[kind][:1] for kind in CATALOGUE]
    found = round(float(np.mean([f["found"] for f in figures.values()])), 4)
    ordered = sum(f["in order"] for f in figures.values())
    print(json.dumps({"reader": reading(reader, world, 1000, 78), "concepts": figures, "found": found,
                      "in order": ordered}, indent=2))  # fmt: skip
    if flags.sheet:
        save_image(make_grid(F.interpolate(torch.cat(rows), scale_factor=2.0), 18, pad_value=1.0), flags.sheet)


if __name__ == "__main__":
    main()
