"""How well the pocket CLIPSeg masks the held-out concepts, none of which it was trained on.

    python -m scripts.pocket.evaluate_masks            # the shipped weights; prints JSON
    python -m scripts.pocket.evaluate_masks --sheet masks.png

Each concept's photos are masked by its noun, as `data/soft_segment.py` does it. A mask is divided by its maximum and
cut at 0.5, the true mask is cut at 0.5, and the figure is the area of their intersection over that of their union,
averaged over all photos. `absent` is the mean maximum of a mask for a noun that the photo does not show, `present` that
for the photo's own. `told_apart` is the share of fresh scenes with two objects in which a noun's mask is stronger on
its own object than on the other.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from clipseg.model import ClipSeg
from clipseg.weights import POCKET_CONFIG, POCKET_WEIGHTS, load
from data.images import read_mask
from data.masks import load_photo
from data.pocket.concepts import CONCEPTS, FOLDER
from data.pocket.world import NOUNS, World, draw_scene
from data.preview import overlay
from ldm.util.cli import Parser, report
from scripts.pocket.judge import Figure, rate
from scripts.pocket_two.masks import masks_of


def iou(mask: Tensor, true: Tensor) -> float:
    """Intersection over union of soft masks (H, W), the first divided by its maximum, both cut at 0.5.

    Two empty masks are the same: 1.
    """
    found, true = mask > mask.max() / 2, true > 0.5
    union = (found | true).sum().item()
    return (found & true).sum().item() / union if union else 1.0


def concept_photos(name: str, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Photos (P, 3, H, W) and true masks (P, H, W) of a concept, both in [0, 1]."""
    paths = sorted((folder / name).glob("*.png"))
    masks = [torch.from_numpy(np.array(read_mask(path.parent / "mask" / path.name))) for path in paths]
    return torch.cat([load_photo(path) for path in paths]), torch.stack(masks)


def evaluate(clipseg: ClipSeg) -> tuple[dict, Tensor]:
    """The figures, and a row of photos and one of overlays for each concept: (R, 3, H, W)."""
    scores: dict[str, list[float]] = {}
    present, absent, rows = [], [], []
    for name, concept in CONCEPTS.items():
        photos, true = concept_photos(name)
        masks = masks_of(clipseg, photos, concept.noun)
        scores[name] = [iou(mask, answer) for mask, answer in zip(masks, true, strict=True)]
        present.append(masks.amax((1, 2)))
        other = NOUNS[(NOUNS.index(concept.noun) + len(NOUNS) // 2) % len(NOUNS)]
        absent.append(masks_of(clipseg, photos, other).amax((1, 2)))
        rows += [photos, torch.stack([overlay(photo, mask) for photo, mask in zip(photos, masks, strict=True)])]
    every = [score for column in scores.values() for score in column]
    figures = {
        "mean_iou": round(sum(every) / len(every), 4),
        "n": len(every),
        "lowest": round(min(every), 4),
        "concepts": {name: round(sum(column) / len(column), 4) for name, column in scores.items()},
        "present": round(torch.cat(present).mean().item(), 4),
        "absent": round(torch.cat(absent).mean().item(), 4),
    }
    return figures, torch.cat(rows)


def told_apart(clipseg: ClipSeg, scenes: int = 200, seed: int = 0) -> Figure:
    """How often a noun's mask is stronger on its own object than on the other, of two in a scene of the world."""
    rng, world, hits = np.random.default_rng(seed), World(), []
    while len(hits) < scenes:
        first, second = (replace(draw_scene(rng), place=place, size="small") for place in ("left", "right"))
        if first.noun != second.noun:
            images, masks = world.render([first, second], rng)
            both = images[0] + masks[1] * (images[1] - images[0])  # (3, 64, 64)
            mask = masks_of(clipseg, both[None], first.noun)[0]
            on_first, on_second = (
                (mask * area[0]).sum() / area.sum() for area in (masks[0] * (1 - masks[1]), masks[1])
            )
            hits.append(bool(on_first > on_second))
    return rate(hits)


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(POCKET_CONFIG), help="config with the node `clipseg`")
    parser.add_argument("--model_weight", default=str(POCKET_WEIGHTS), help="weights of that network")
    parser.add_argument("--sheet", metavar="PNG", default=None, help="picture of every photo beside its mask")
    flags = parser.parse_args(arguments)
    clipseg = load(flags.model_weight, config=flags.config)
    figures, rows = evaluate(clipseg)
    print(json.dumps(figures | {"told_apart": told_apart(clipseg)}, indent=2))
    if flags.sheet:
        save_image(make_grid(rows, 10), flags.sheet)


if __name__ == "__main__":
    main()
