"""The concepts of the pocket world: objects held out of it, each shown in five pictures of one context.

    python -m data.pocket.concepts            # draws data/pocket/concepts/ and docs/pocket-world.png anew

Level 1 combines known attributes as training never did; level 2 has an unseen pattern or pair of colours; level 3 is a
third drawing set's shape of a known noun. One context each (a style and a background), so that a method can overfit to
it.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid, save_image

from data.pocket.scene import CONCEPTS, PocketConcept
from data.pocket.world import World, draw_scene, to_images

FOLDER = Path(__file__).with_name("concepts")
SHEET = Path(__file__).parents[2] / "docs" / "pocket-world.png"


def draw(concept: PocketConcept, world: World, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Five images (5, 3, 64, 64) and masks (5, 1, 64, 64), both in [0, 1]."""
    return world.render(concept.scenes(), np.random.default_rng(seed), concept.drawing, concept.second)


def write_concepts(folder: Path = FOLDER) -> None:
    """Write `<folder>/<name>/0.png …` and `<folder>/<name>/mask/0.png …`."""
    world = World()
    for seed, (name, concept) in enumerate(CONCEPTS.items()):
        images, masks = draw(concept, world, seed)
        (folder / name / "mask").mkdir(parents=True, exist_ok=True)
        for i, (image, mask) in enumerate(zip(to_images(images), to_images(masks.expand(-1, 3, -1, -1)), strict=True)):
            image.save(folder / name / f"{i}.png", optimize=True)
            mask.convert("L").save(folder / name / "mask" / f"{i}.png", optimize=True)


def write_sheet(path: Path = SHEET) -> None:
    """Six rows of the world, then a row per concept."""
    world, rng = World(), np.random.default_rng(0)
    images, _ = world.render([draw_scene(rng) for _ in range(6 * 15)], rng)
    rows = [images]
    for seed in range(0, len(CONCEPTS), 3):  # three concepts a row
        rows += [
            draw(concept, world, seed + i)[0] for i, concept in enumerate(list(CONCEPTS.values())[seed : seed + 3])
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(make_grid(F.interpolate(torch.cat(rows), scale_factor=1.25, mode="bilinear"), 15, pad_value=1.0), path)


if __name__ == "__main__":
    write_concepts()
    write_sheet()
