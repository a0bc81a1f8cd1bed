"""Learns a concept of each level on the pocket model, draws it in new contexts, measures that, and writes a report.

python scripts/demo.py                    # five minutes on two cores; outputs/demo/report.html
python scripts/demo.py --concepts other_fish trainer.max_steps=200
"""

import argparse
import logging
import shlex
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.pocket.scene import CONCEPTS
from infusion.sampling.settings import Settings
from ldm.util.cli import Parser, batch, count, number, report, seed, suggestion, writable
from ldm.util.config import find, load_config
from ldm.util.defaults import POCKET_CLASSIFIER, POCKET_CLIP, POCKET_CLIPSEG

logger = logging.getLogger(__name__)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Learns concepts on the pocket model, draws, measures and reports them.")
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="overrides of the config, such as trainer.max_steps=200")
    add("--base", metavar="FILE", help="config to train with", default="configs/pocket_demo.yaml")
    usual = "blue_striped_dog,zigzag_hat,other_backpack"
    add("--concepts", metavar="A[,B]", help=f"some of {', '.join(CONCEPTS)}", default=usual)
    add("--samples", type=count, help="samples of each concept, 2 or more, spread over 14 prompts", default=32)
    add("--steps", type=count, help="DDIM steps, at most 999", default=25)
    add("--scale", type=number, help="classifier-free guidance", default=5.0)
    add("--seed", type=seed, help="of the first sample; sample i has the seed + i", default=100)
    add("--batch_size", type=batch, help="samples at a time", default=16)
    add("--clip", metavar="FILE", help="weights of the pocket CLIP", default=str(POCKET_CLIP))
    add("--masks", choices=["clipseg", "true"], help="of the photos: CLIPSeg's, or the world's own", default="clipseg")
    add("--clipseg", metavar="FILE", help="weights of the pocket CLIPSeg", default=str(POCKET_CLIPSEG))
    add("--classifier", metavar="FILE", help="weights of the pocket classifier", default=str(POCKET_CLASSIFIER))
    add("--outdir", metavar="DIR", type=writable, help="written to; DIR-2 … if that is full", default="outputs/demo")
    flags = parser.parse_args(arguments)
    flags.concepts = list(dict.fromkeys(flags.concepts.split(",")))
    for name in flags.concepts:
        if name not in CONCEPTS:
            parser.error(f"--concepts: there is no `{name}`{suggestion(name, list(CONCEPTS))}")
    if flags.samples < 2:
        parser.error(f"--samples: at least 2 are needed, not {flags.samples}")
    if flags.steps > 999:
        parser.error(f"--steps: at most 999 are possible, not {flags.steps}")
    return flags


@report
def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    flags, started = parse(arguments), time.monotonic()
    from clipseg.weights import POCKET_CONFIG, load  # after the flags: it takes seconds
    from ldm.pipeline import StableDiffusion
    from scripts.pocket.demo import Plan, free_folder, learn, write_report
    from scripts.pocket.judge import Judge

    judge = Judge.load(clip_weights=flags.clip, classifier_weights=flags.classifier)
    clipseg = load(flags.clipseg, config=POCKET_CONFIG) if flags.masks == "clipseg" else None
    base = str(find(flags.base))
    sd = StableDiffusion.from_checkpoint(load_config(base, flags.overrides))
    settings = Settings(steps=flags.steps, scale=flags.scale)
    folder = free_folder(Path(flags.outdir))
    plan = Plan(base, tuple(flags.overrides), flags.samples, flags.seed, settings, flags.batch_size, folder)
    concepts = []
    for i, name in enumerate(flags.concepts):
        logger.info("%d/%d %s", i + 1, len(flags.concepts), name)
        concepts.append(learn(name, plan, sd, clipseg, judge))
    words = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "scripts/demo.py", *words])
    page = write_report(plan, concepts, sd, time.monotonic() - started, command)
    for concept in concepts:
        like = concept["figures"]["similarity"]
        logger.info("%s: likeness %.2f -> %.2f", concept["name"], like["base"]["value"], like["infusion"]["value"])
    logger.info("%.0f s; open %s", time.monotonic() - started, page)


if __name__ == "__main__":
    main()
