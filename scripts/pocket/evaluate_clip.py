"""How often the pocket CLIP knows what a scene shows.

    python -m scripts.pocket.evaluate_clip            # 400 scenes, the shipped weights; prints JSON

Of each scene one part at a time is put to the test: of the captions that differ in that part alone, one for each of its
words, the right one has to be nearest to the image. So a guess is right once in as many words (`words`).
"""

import json
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange

from data.pocket.world import CHOICES, World, caption, draw_scene
from ldm.models.clip import Clip
from ldm.util.cli import Parser, report
from ldm.util.config import find, instantiate, load_config, resolve
from ldm.weights.checkpoint import load_into
from scripts.pocket.judge import CLIP_CONFIG, CLIP_WEIGHTS


@torch.no_grad()
def accuracy(clip: Clip, count: int, seed: int = 0) -> dict[str, float]:
    """For each part of a scene, the share of `count` random scenes in which CLIP finds its word."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng) for _ in range(count)]
    images = clip.image_features(World().render(scenes, rng)[0])  # (B, F)
    found = {}
    for part, words in CHOICES.items():
        captions = [caption(replace(scene, **{part: word})) for scene in scenes for word in words]
        texts = rearrange(clip.text_features(captions), "(b words) f -> b words f", b=count)
        nearest = torch.einsum("bwf,bf->bw", texts, images).argmax(1).tolist()
        hits = [words[i] == getattr(scene, part) for i, scene in zip(nearest, scenes, strict=True)]
        found[part] = round(sum(hits) / count, 4)
    return found


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(CLIP_CONFIG), help="config with the node `clip`")
    parser.add_argument("--ckpt", default=str(CLIP_WEIGHTS), help="weights of that CLIP")
    parser.add_argument("--n", type=int, default=400, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    flags = parser.parse_args(arguments)
    clip = instantiate(resolve(load_config(find(flags.config))).clip, "clip")
    load_into({"": clip}, find(flags.ckpt))
    figures = {"right": accuracy(clip.eval(), flags.n, flags.seed)}
    print(
        json.dumps(figures | {"words": {part: len(words) for part, words in CHOICES.items()}, "n": flags.n}, indent=2)
    )


if __name__ == "__main__":
    main()
