"""How often concepts appear together, against each alone: counted by the pocket CLIPSeg, with and without regions.

    python -m scripts.pocket.several A,B                               # concept files, such as those of make demo
    python -m scripts.pocket.several A,B,C --outdir outputs/three      # gets grid.png and results.json

The prompts are "a photo of a {1} and a {2} on grass" and so on over the backgrounds. The base model draws the same
prompts from the same seeds: the pocket world's scenes have one object each, so that two are new to it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from clipseg.model import ClipSeg
from clipseg.weights import POCKET, load
from data.photos import fill_templates
from data.pocket.backgrounds import BACKGROUNDS
from infusion.concepts.concept import Concept
from infusion.sampling.pictures import captioned_grid, png
from infusion.sampling.regions import Region
from infusion.sampling.sample import sample
from infusion.sampling.settings import Settings
from infusion.tokens import fill
from ldm.pipeline import StableDiffusion
from ldm.util.cli import Parser, UserError, count, find_device, report, seed
from ldm.util.config import find
from ldm.util.files import write
from scripts.pocket.judge import Figure, rate

PRESENT = 0.5  # of a mask's maximum


def columns(concepts: int) -> tuple[Region, ...]:
    """A region for each concept: upright strips of the same width, from left to right."""
    return tuple(Region(k + 1, k / concepts, 0, (k + 1) / concepts, 1) for k in range(concepts))


def found(clipseg: ClipSeg, images: Tensor, nouns: Sequence[str]) -> list[list[bool]]:
    """Which of the images (B, 3, H, W) in [0, 1] show each of K nouns: K lists of B.

    A noun is there where its mask exceeds one half, and at least half of these places are more its than another's.
    """
    masks = torch.stack([clipseg.masks(images, fill_templates(noun, ["a photo of a {}", "a {}"])) for noun in nouns])
    places = masks > PRESENT  # (K, B, S, S)
    owned = places & (masks == masks.amax(0))
    area, own = places.sum((2, 3)), owned.sum((2, 3))  # (K, B)
    return ((area > 0) & (2 * own >= area)).tolist()


def together(clipseg: ClipSeg, images: Tensor, nouns: Sequence[str]) -> dict[str, Figure]:
    """The share of images in which each noun is found, and in which all are."""
    hits = found(clipseg, images, nouns)
    shares = {f"{number} {noun}": rate(own) for number, (noun, own) in enumerate(zip(nouns, hits, strict=True), 1)}
    return shares | {"all": rate([all(shown) for shown in zip(*hits, strict=True)])}


@report
def main(arguments: list[str] | None = None) -> None:
    usual = Settings(steps=25, scale=5.0)
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("concepts", metavar="A,B[,C]", help="concept files")
    add("--config", help="backbone config", default="configs/backbone/pocket.yaml")
    add("--clipseg", help="weights of CLIPSeg, or pocket", default=POCKET)
    add("--samples", type=count, help="of each kind", default=64)
    add("--seed", type=seed, help="of the first sample", default=100)
    add("--outdir", metavar="DIR", help="gets grid.png and results.json", default="outputs/several")
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    flags = parser.parse_args(arguments)
    outdir = Path(flags.outdir)
    if outdir.exists():
        raise UserError(f"--outdir: {outdir} exists already; name another folder, or remove it")
    concepts = [Concept.load(find(name)) for name in flags.concepts.split(",")]
    if len(concepts) < 2:
        raise UserError("concepts: name two files or more, with commas between them")
    clipseg = load(flags.clipseg)
    sd = StableDiffusion.from_checkpoint(find(flags.config), device=find_device(flags.device))
    nouns = [concept.superclass for concept in concepts]
    seeds = [flags.seed + i for i in range(flags.samples)]
    places = list(BACKGROUNDS.values())

    def draw(things: str, used: Sequence[Concept], regions: Sequence[Region] = ()) -> Tensor:
        templates = [f"a photo of {things} {places[i % len(places)]}" for i in range(flags.samples)]
        templates = templates if used else [fill(template, nouns) for template in templates]
        settings = Settings(usual.steps, usual.scale, region=regions)
        batches = [slice(start, start + 16) for start in range(0, flags.samples, 16)]
        kind = "base model" if not used else "with regions" if regions else f"{len(used)} concepts"
        images = [sample(sd, templates[b], used, settings, seed=seeds[b]) for b in tqdm(batches, kind)]
        return torch.cat(images).cpu()

    scene = " and ".join(f"a {{{k}}}" for k in range(1, len(nouns) + 1))
    drawn = {"base model": draw(scene, ()), "concepts": draw(scene, concepts)}
    drawn["with regions"] = draw(scene, concepts, columns(len(concepts)))
    figures = {kind: together(clipseg, images, nouns) for kind, images in drawn.items()}
    figures["alone"] = {}
    for number, (concept, noun) in enumerate(zip(concepts, nouns, strict=True), 1):
        figures["alone"][f"{number} {noun}"] = rate(found(clipseg, draw("a {}", [concept]), [noun])[0])
    results = {"shares": figures, "prompt": f"a photo of {scene} …", "nouns": nouns, "samples": flags.samples}
    results |= {"seed": flags.seed, "concepts": flags.concepts, "present_above": PRESENT, "base_sha256": sd.hash}
    shown = [f"{places[i]} ({seeds[i]})" for i in range(min(len(places), flags.samples))]
    sheet = captioned_grid({kind: images[: len(shown)] for kind, images in drawn.items()}, shown)
    write(outdir / "grid.png", png(sheet, {"prompt": scene, "concepts": flags.concepts}))
    text = json.dumps(results, indent=2, ensure_ascii=False)
    write(outdir / "results.json", text.encode())
    print(text)


if __name__ == "__main__":
    main()
