"""How well the pocket CLIPSeg masks the concepts, none of which it was trained on.

    python -m scripts.pocket_two.masks --sheet masks.png            # prints JSON

Each concept's photos are masked by its noun, as `data/soft_segment.py` does it. A mask is divided by its maximum and
cut at 0.5, the true mask is cut at 0.5, and the figure is the area of their intersection over that of their union.
`own` is the share of fresh scenes with two objects in which each noun's mask is stronger on its own object.
"""

import json

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from clipseg.model import ClipSeg
from clipseg.weights import load
from data.photos import fill_templates
from data.pocket_two.concepts import CONCEPTS, draw
from data.pocket_two.world import World, draw_scene
from data.preview import enlarge, overlay
from data.prompts import TEMPLATES
from ldm.util.cli import Parser, report
from scripts.pocket_two.judges import FOLDER

CONFIG = "configs/pocket_two/clipseg.yaml"
SCENES = 200  # with two objects


def masks_of(clipseg: ClipSeg, photos: Tensor, noun: str) -> Tensor:
    """Masks (P, H, W) in [0, 1] of what a noun names in photos (P, 3, H, W) in [0, 1]."""
    small = clipseg.masks(photos, fill_templates(noun, TEMPLATES))
    return torch.stack([enlarge(mask, photos.shape[2:]) for mask in small])


def iou(masks: Tensor, true: Tensor) -> Tensor:
    """Intersection over union (P,) of soft masks (P, H, W), the first divided by their maxima, both cut at 0.5."""
    found, true = masks > masks.amax((1, 2), keepdim=True) / 2, true > 0.5
    return (found & true).sum((1, 2)) / (found | true).sum((1, 2))


def told_apart(clipseg: ClipSeg, world: World, seed: int) -> float:
    """The share of objects, two in a scene, on which the mask of their own noun is stronger than on the other."""
    rng, hits = np.random.default_rng(seed), []
    for _ in range(SCENES):
        scene = draw_scene(rng, pairs=1.0)
        images, areas = world.render([scene], rng)  # (1, 3, 64, 64), (1, 2, 64, 64)
        for own, other in ((0, 1), (1, 0)):
            mask = masks_of(clipseg, images, scene.things[own].thing.noun)[0]
            strength = (mask * areas[0]).sum((1, 2)) / areas[0].sum((1, 2))
            hits.append(bool(strength[own] > strength[other]))
    return float(np.mean(hits))


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=CONFIG, help="config with the node `clipseg`")
    parser.add_argument("--model_weight", default=f"{FOLDER}/clipseg.safetensors", help="weights of that network")
    parser.add_argument("--sheet", metavar="PNG", default=None, help="picture of every photo above its mask")
    flags = parser.parse_args(arguments)
    clipseg, world, scores, rows = load(flags.model_weight, config=flags.config), World(), {}, []
    for seed, (name, concept) in enumerate(CONCEPTS.items()):
        photos, true = draw(concept, world, seed)
        masks = masks_of(clipseg, photos, concept.thing.noun)
        scores[name] = round(float(iou(masks, true[:, 0]).mean()), 4)
        rows += [photos, torch.stack([overlay(photo, mask) for photo, mask in zip(photos, masks, strict=True)])]
    mean = round(float(np.mean(list(scores.values()))), 4)
    own = round(told_apart(clipseg, world, seed=1000), 4)
    print(json.dumps({"mean": mean, "worst": min(scores.values()), "concepts": scores, "own": own}, indent=2))
    if flags.sheet:
        save_image(make_grid(torch.cat(rows), 10), flags.sheet)


if __name__ == "__main__":
    main()
