"""A concept blending in: one prompt and seed, β falling from left to right, a row for each τ.

    python -m scripts.pocket.gate_figure outputs/demo/concepts/blue_striped_dog.safetensors docs/gate.png

The gate on the concept's token is σ((s / E − β) / τ) with s / E near 1 there (`infusion.gate`): as β falls below 1 it
opens, at once for a small τ and softly for a large one.
"""

from pathlib import Path

import torch

from infusion.concepts.concept import Concept
from infusion.sampling.pictures import captioned_grid, png
from infusion.sampling.sample import sample
from infusion.sampling.settings import Settings
from infusion.tokens import fill
from ldm.pipeline import StableDiffusion
from ldm.util.cli import Parser, UserError, find_device, numbers, report, seed
from ldm.util.config import find
from ldm.util.files import write

BETAS = (1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.5, 0.2)
TAUS = (0.02, 0.15, 0.5)
USUAL = Settings(steps=25, scale=5.0)


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("concept", metavar="CONCEPT", help="concept file")
    add("picture", metavar="PNG", help="what to write")
    add("--config", help="backbone config", default="configs/backbone/pocket.yaml")
    add("--prompt", help="{} is the concept", default="a photo of a {} on a wooden floor")
    add("--beta", type=numbers, help="of the columns", default=",".join(map(str, BETAS)))
    add("--tau", type=numbers, help="of the rows", default=",".join(map(str, TAUS)))
    add("--seed", type=seed, help="of every image", default=0)
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    flags = parser.parse_args(arguments)
    if Path(flags.picture).exists():
        raise UserError(f"{flags.picture}: exists already; name another file, or remove it")
    concept = Concept.load(find(flags.concept))
    sd = StableDiffusion.from_checkpoint(find(flags.config), device=find_device(flags.device))
    rows = {}
    for tau in flags.tau:
        settings = [Settings(USUAL.steps, USUAL.scale, beta=beta, tau=tau) for beta in flags.beta]
        images = [sample(sd, [flags.prompt], [concept], how, seed=flags.seed) for how in settings]
        rows[f"tau = {tau:g}"] = torch.cat(images)
    plain = fill(flags.prompt, [concept.superclass])
    above = {"base model": sample(sd, [plain], settings=USUAL, seed=flags.seed)}
    sheet = captioned_grid(rows, [f"beta = {beta:g}" for beta in flags.beta], above)
    write(Path(flags.picture), png(sheet, {"prompt": flags.prompt, "seed": flags.seed, "concept": flags.concept}))


if __name__ == "__main__":
    main()
