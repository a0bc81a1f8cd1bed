"""How often the pocket model draws what a prompt asks for.

    python -m scripts.pocket_two.samples --grid samples.png           # prints JSON

Prompts name everything of a scene. Those with one object have a combination that training never shows. A reader that
had no part in training the model reads the samples; what it reads of scenes that the world draws is the ceiling.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from data.pocket_two.captions import caption
from data.pocket_two.judge import ORDER, SceneReader
from data.pocket_two.scene import CHOICES, COLOURS, NATURAL, NONE, Scene, ThingWords
from data.pocket_two.world import World, draw_scene
from ldm.pipeline import StableDiffusion
from ldm.util.cli import Parser, report
from ldm.util.config import find
from ldm.weights.checkpoint import load_into
from scripts.pocket_two.autoencoder import CONFIG
from scripts.pocket_two.judges import FOLDER

PARTS = ("noun", "style", "colour", "texture", "background", "place")


def has_colours(scores: Tensor, thing: ThingWords) -> bool | None:
    """Whether the strongest of the colours (11,) are those that were named; None if none was."""
    if thing.colour == NATURAL:
        return None
    named = {thing.colour, thing.second} - {NONE}
    strongest = scores.topk(len(named)).indices.tolist()
    return {tuple(COLOURS)[i] for i in strongest} == named


@torch.no_grad()
def rates(reader: SceneReader, images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Shares of images (B, 3, 64, 64) of one object each that show each part of their scene."""
    read = reader(images * 2 - 1)
    right: dict[str, list[bool]] = {part: [] for part in PARTS}
    for i, scene in enumerate(scene.words() for scene in scenes):
        (thing,) = scene.things
        for part in ("style", "background"):
            right[part].append(CHOICES[part][read[part][i].argmax()] == getattr(scene, part))
        for part in ("noun", "texture", "place"):
            right[part].append(CHOICES[part][read[part][i, 0].argmax()] == getattr(thing, part))
        coloured = has_colours(read["colours"][i, 0], thing)
        if coloured is not None:
            right["colour"].append(coloured)
    return {part: round(float(np.mean(values)), 4) for part, values in right.items()}


@torch.no_grad()
def pair_rates(reader: SceneReader, images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Shares of images (B, 3, 64, 64) of two objects: both nouns there, both in their own colours, both in place."""
    read = reader(images * 2 - 1)
    nouns, colours, places = [], [], []
    for i, scene in enumerate(scenes):
        things = sorted(scene.words().things, key=lambda thing: ORDER[thing.place])
        found = [CHOICES["noun"][index] for index in read["noun"][i].argmax(-1).tolist()]
        two = bool(read["count"][i].argmax() == 1)
        wanted = [thing.noun for thing in things]
        nouns.append(two and sorted(found) == sorted(wanted))
        places.append(two and found == wanted)
        slots = (0, 1) if found == wanted else (1, 0)
        own = [has_colours(read["colours"][i, slot], thing) for slot, thing in zip(slots, things, strict=True)]
        colours.append(nouns[-1] and all(value is not False for value in own))
    figures = {"nouns": nouns, "colours": colours, "places": places}
    return {name: round(float(np.mean(values)), 4) for name, values in figures.items()}


def draw_samples(sd: StableDiffusion, scenes: list[Scene], steps: int, scale: float, seed: int, size: int) -> Tensor:
    """One sample (3, 64, 64) in [0, 1] for each scene's whole caption; sample i has the seed `seed + i`."""
    images = []
    for start in tqdm(range(0, len(scenes), size), "sampling"):
        prompts = [caption(scene.words()) for scene in scenes[start : start + size]]
        images.append(sd.sample(prompts, steps=steps, scale=scale, seed=seed + start))
    return torch.cat(images).cpu()


@report
def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=CONFIG, help="backbone config")
    parser.add_argument("--ckpt", default=None, help="weights of the pocket model; none: the shipped ones")
    parser.add_argument("--reader", default=f"{FOLDER}/classifier.safetensors", help="weights of the reader")
    parser.add_argument("--n", type=int, default=512, help="prompts with one object; half as many with two")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--scale", type=float, default=5.0, help="guidance scale")
    parser.add_argument("--seed", type=int, default=1000, help="of the prompts and of the first sample")
    parser.add_argument("--batch_size", type=int, default=32, help="samples at a time")
    parser.add_argument("--grid", default=None, help="PNG to write the samples to; those of two objects beside it")
    flags = parser.parse_args()

    reader, world = SceneReader().eval(), World()
    load_into({"": reader}, find(flags.reader))
    sd = StableDiffusion.from_checkpoint(find(flags.config), flags.ckpt)
    rng = np.random.default_rng(flags.seed)
    single = [draw_scene(rng, untrained_ones=True, pairs=0.0) for _ in range(flags.n)]
    double = [draw_scene(rng, untrained_ones=None, pairs=1.0) for _ in range(flags.n // 2)]
    sampling = {"steps": flags.steps, "scale": flags.scale, "size": flags.batch_size}
    images = draw_samples(sd, single, seed=flags.seed, **sampling)
    pairs = draw_samples(sd, double, seed=flags.seed + flags.n, **sampling)
    figures = {
        "one": rates(reader, images, single),
        "one, drawn": rates(reader, world.render(single, rng)[0], single),
        "two": pair_rates(reader, pairs, double),
        "two, drawn": pair_rates(reader, world.render(double, rng)[0], double),
        "settings": {name: getattr(flags, name) for name in ("n", "steps", "scale", "seed")},
    }
    print(json.dumps(figures, indent=2))
    if flags.grid:
        save_image(make_grid(images[:160], 16), flags.grid)
        save_image(make_grid(pairs[:160], 16), Path(flags.grid).with_stem(f"{Path(flags.grid).stem}-two"))


if __name__ == "__main__":
    main()
