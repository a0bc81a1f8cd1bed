"""How often the pocket model draws what a prompt asks for, on combinations that it was never trained on.

    python -m scripts.pocket.evaluate                 # 256 prompts, the shipped weights; prints JSON

Each prompt names every part of a scene that has an untrained combination (`data.pocket.world.untrained`). A classifier
that was trained on the world reads the samples; its own accuracy on drawn scenes of that kind is printed beside, as the
ceiling.
"""

import json

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from data.pocket.classifier import SceneClassifier
from data.pocket.world import CHOICES, Scene, World, caption, draw_scene
from ldm.pipeline import StableDiffusion
from ldm.util.cli import Parser, report
from ldm.util.config import find
from ldm.weights.checkpoint import load_into
from scripts.pocket.judge import CLASSIFIER_WEIGHTS


def rates(classifier: SceneClassifier, images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """For each part of a scene, the share of images (B, 3, 64, 64) that the classifier reads rightly."""
    found = classifier.read(images)
    right = {name: [word == getattr(s, name) for word, s in zip(found[name], scenes, strict=True)] for name in CHOICES}
    return {name: round(sum(column) / len(column), 4) for name, column in right.items()}


@report
def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/backbone/pocket.yaml", help="backbone config")
    parser.add_argument("--ckpt", default=None, help="weights of the pocket model; none: the shipped ones")
    parser.add_argument("--classifier", default=str(CLASSIFIER_WEIGHTS), help="weights of the judge")
    parser.add_argument("--n", type=int, default=256, help="number of prompts, one sample each")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--scale", type=float, default=5.0, help="guidance scale")
    parser.add_argument("--seed", type=int, default=1000, help="of the prompts and of the first sample")
    parser.add_argument("--batch_size", type=int, default=32, help="samples at a time")
    parser.add_argument("--grid", default=None, help="PNG to write the samples to")
    flags = parser.parse_args()

    classifier = SceneClassifier()
    load_into({"": classifier}, find(flags.classifier))
    sd = StableDiffusion.from_checkpoint(find(flags.config), flags.ckpt)
    rng = np.random.default_rng(flags.seed)
    scenes = [draw_scene(rng, untrained_ones=True) for _ in range(flags.n)]
    prompts = [caption(scene) for scene in scenes]
    images = []
    for start in tqdm(range(0, flags.n, flags.batch_size), "sampling"):
        batch = prompts[start : start + flags.batch_size]
        images.append(sd.sample(batch, steps=flags.steps, scale=flags.scale, seed=flags.seed + start))
    images = torch.cat(images)
    drawn, _ = World().render(scenes, rng)
    figures = {"samples": rates(classifier, images, scenes), "drawn": rates(classifier, drawn, scenes)}
    settings = {name: getattr(flags, name) for name in ("n", "steps", "scale", "seed")}
    print(json.dumps(figures | {"settings": settings}, indent=2))
    if flags.grid:
        save_image(make_grid(images, 16), flags.grid)


if __name__ == "__main__":
    main()
