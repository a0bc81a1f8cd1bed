"""Draws prompts with learned concepts: `{}` in a prompt is the concept, `{1}`, `{2}` … are several.

python scripts/infusion_txt2img.py --personalized_ckpt cat.safetensors --prompt "a photo of a {} on the beach"
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from math import ceil
from pathlib import Path
from secrets import randbelow
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from infusion.concepts.base import architecture_of, check_concepts_there, check_weights, load_base
from infusion.concepts.runs import concept_file
from infusion.sampling.prompts import Job, read_jobs
from infusion.sampling.settings import Settings, add_settings_flags
from infusion.sampling.validate import check_concepts, check_sizes, check_texts, check_words, fill_in
from ldm.util.cli import (
    MOST,
    More,
    Parser,
    UserError,
    add_base_flags,
    any_seed,
    batch,
    count,
    find_device,
    naming,
    processes,
    report,
    words,
    writable,
)
from ldm.util.config import BACKBONES, files_in, find
from ldm.util.files import read_text
from ldm.util.templates import fill

if TYPE_CHECKING:
    from torch import Tensor

    from infusion.concepts.concept import Concept
    from ldm.pipeline import StableDiffusion
    from ldm.util.dist import Ranks

FILE = 2_000_000  # bytes of a file of prompts, at most
logger = logging.getLogger(__name__)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Draws prompts with learned concepts.")
    add = parser.add_argument
    add("--config", metavar="FILE", help="backbone config; None: the one that the concept file names")
    add_base_flags(parser)
    about = "concept files; again for more; none: the base model alone, which needs --config"
    add("--personalized_ckpt", metavar="A[,B]", type=files_in, action=More, default=[], help=about)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="{} is the concept, {1}, {2} … are several", default="a photo of a {}")
    prompts.add_argument("--from-file", metavar="FILE", help="prompts, one a line, with --n --w --h --s --l --d behind")
    prompts.add_argument("--from-png", metavar="FILE", help="draw a picture again; flags that are given change it")
    add("--target_word", metavar="W[,W]", type=words, help="words of the prompt that are the concepts, in place of {}")
    add_settings_flags(parser)
    add("--covariance", metavar="FILE", help="C⁻¹ that the concept was trained with; None: the identity")
    add("--n_samples", type=batch, help="images of a prompt at a time", default=4)
    add("--n_iter", type=count, help="how often to go through the prompts", default=1)
    add("--n_rows", type=count, metavar="N", help="images in a row of the grid; None: --n_samples")
    about = "of the first image; image i has the seed + i; -1 draws one, which is printed"
    add("--seed", type=any_seed, help=about, default=42)
    add("--outdir", metavar="DIR", type=writable, help="gets samples/ and grid-0000.png", default="outputs/txt2img")
    add("--skip_grid", action="store_true", help="write no grid")
    add("--skip_save", action="store_true", help="write no single images")
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    add("--devices", type=processes, help="processes of this machine that share the images, one a device", default=1)
    add("--num_nodes", type=count, help="machines that share them", default=1)
    flags = parser.parse_args(arguments)
    flags.said = {}
    if flags.from_png:
        from infusion.sampling.png import defaults, recall  # after the flags: it takes seconds

        if not Path(flags.from_png).is_file():
            raise UserError(f"{flags.from_png}: cannot be read as a picture (there is no such file)")
        said = recall(flags.from_png)
        parser.set_defaults(**defaults(said))
        flags = parser.parse_args(arguments)
        flags.said = said
    for name in ("covariance", "target_word", "noun", "region", "gate"):
        if getattr(flags, name) and not flags.personalized_ckpt:
            parser.error(f"--{name}: is of a concept, and no --personalized_ckpt is given")
    if flags.target_word and flags.noun:
        parser.error("--target_word and --noun: name the words that are there, or those to write, not both")
    if flags.skip_grid and flags.skip_save:
        parser.error("--skip_grid and --skip_save together leave nothing to write")
    return flags


def read_prompts(flags: argparse.Namespace, settings: Settings) -> list[Job]:
    if flags.from_file is None:
        return [Job(flags.prompt, settings)]
    with naming("--from-file"):
        text = read_text(flags.from_file, FILE)
        with naming(flags.from_file):
            return read_jobs(text, settings)


def read_concepts(flags: argparse.Namespace) -> "dict[str, Concept]":
    """Concepts by their files' names as given."""
    from infusion.concepts.concept import Concept

    return {name: Concept.load(find(name)) for name in flags.personalized_ckpt}


def check_inputs(flags: argparse.Namespace) -> None:
    """Raises UserError for a file that is not there, before what is slow to import."""
    names = flags.personalized_ckpt
    check_concepts_there(names)
    names[:] = [str(concept_file(find(name))) if find(name).is_dir() else name for name in names]
    if flags.covariance and not find(flags.covariance).is_file():
        raise UserError(f"{flags.covariance}: there is no such covariance file")
    if flags.from_file and not os.path.exists(flags.from_file):
        raise UserError(f"--from-file: {flags.from_file} cannot be read as text (there is no such file)")
    architecture = architecture_of(find(names[0])) if names else None
    if flags.config or architecture or not names:
        check_weights(flags, find_config(flags, architecture))


def find_config(flags: argparse.Namespace, architecture: str | None) -> Path:
    """The config that the flags name, or else the one of the concepts' architecture; None is that of no concept."""
    if flags.config:
        return find(flags.config)
    if architecture is None:
        raise UserError("--personalized_ckpt: name a concept file, or name a backbone by --config to draw without one")
    path = BACKBONES / f"{architecture}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise UserError(
            f"--config: the concept was trained on {architecture!r}, which is not one of {known}: name its config"
        )
    return path


def plan(flags: argparse.Namespace, jobs: list[Job], templates: list[str], world: int) -> list[tuple[Job, str, range]]:
    """Job, template and seeds of each batch: of one prompt, and no more images than each of `world` processes has.

    A line with a seed of its own draws the next `n_samples` seeds each time round; the others share those of the flags.
    """
    rounds = [(job, template) for _ in range(flags.n_iter) for job, template in zip(jobs, templates, strict=True)]
    size, batches = min(flags.n_samples, ceil(len(rounds) * flags.n_samples / world)), []
    for index, (job, template) in enumerate(rounds):
        own = job.seed is not None
        first = job.seed + index // len(jobs) * flags.n_samples if own else flags.seed + index * flags.n_samples
        seeds = range(first, first + flags.n_samples)
        batches += [(job, template, seeds[i : i + size]) for i in range(0, flags.n_samples, size)]
    return batches


def warn_of_change(flags: argparse.Namespace, hashes: dict[str, str]) -> None:
    """Warns where a picture that is drawn again was made from other files."""
    for name, here in hashes.items():
        if "config" in flags.said and flags.said.get(name, "") != here:  # a picture of ours
            logger.warning("warning: --from-png: the picture was made with another file: %s differs", name)


def draw(
    sd: "StableDiffusion",
    batches: list[tuple[Job, str, range]],
    concepts: "list[Concept]",
    inverse_covariance: "Tensor | None",
    ranks: "Ranks",
    single: bool,
) -> Iterator["tuple[Job, str, int, Tensor]"]:
    """Each image (3, H, W) with its job, template and seed, in order, on every process; processes share the batches.

    The bar shows the steps of a `single` prompt, else the prompts.
    """
    from infusion.sampling.sample import sample

    how = {"inverse_covariance": inverse_covariance, "progress": single and ranks.first}
    for start in tqdm(range(0, len(batches), ranks.world), "prompts", disable=single or not ranks.first):
        made = []
        for job, template, seeds in batches[start + ranks.rank :][:1]:  # at the end, some processes have none
            prompts = [template] * len(seeds)
            made.append(sample(sd, prompts, concepts, job.settings, seed=seeds, **how).cpu())
        everyone = [images for of_one in ranks.gather(made) for images in of_one]
        for (job, template, seeds), images in zip(batches[start : start + ranks.world], everyone, strict=True):
            for number, image in zip(seeds, images, strict=True):
                yield job, template, number, image


@report
def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    flags = parse(arguments)
    check_inputs(flags)
    from infusion.covariance import InverseCovariance  # after the flags: these take seconds
    from infusion.sampling.customised import check_covariance, nouns_of
    from infusion.sampling.pictures import Numbered, grid, png
    from infusion.sampling.png import PARAMETERS, describe, hashes, parameters
    from infusion.sampling.regions import regions
    from ldm.util.dist import launch

    boxes = flags.region or ""
    flags.region = regions(boxes if isinstance(boxes, str) else " ".join(boxes))
    flags.noun = flags.noun or flags.target_word
    try:
        settings = Settings(**{field.name: getattr(flags, field.name) for field in fields(Settings)})
    except UserError as error:
        raise UserError(f"--{error}") from error
    jobs = read_prompts(flags, settings)
    check_words(flags, jobs)
    if (total := len(jobs) * flags.n_iter * flags.n_samples) > MOST:
        raise UserError(f"--n_iter: {total:,} images in all are more than {MOST:,}")
    files = read_concepts(flags)
    concepts, inverse = list(files.values()), InverseCovariance(flags.covariance)
    templates = fill_in(flags, jobs, concepts)
    check_covariance(concepts, inverse.matrix)
    outdir = Path(flags.outdir)
    samples, grids = Numbered(outdir / "samples"), Numbered(outdir, "grid-", digits=4)
    ranks, device = launch(flags.devices, flags.num_nodes, find_device(flags.device))
    if flags.seed == -1:
        flags.seed = ranks.of_first(randbelow(2**32))
        logger.info("seed %d", flags.seed)
    sd = load_base(flags, find_config(flags, concepts[0].architecture if concepts else None), concepts, device)
    flags.use_ema = sd.use_ema  # for what a picture says of itself
    check_concepts(sd, files, inverse.matrix)
    check_sizes(sd, jobs)
    check_texts(sd, flags, jobs, templates, concepts, settings.noun)
    of_files = hashes(sd.hash, list(files), inverse.fingerprint)
    warn_of_change(flags, of_files)

    batches = plan(flags, jobs, templates, ranks.world)
    drawn, paths, spoilt = {}, [], []
    single = len(jobs) * flags.n_iter == 1
    for job, template, number, image in draw(sd, batches, concepts, inverse.matrix, ranks, single):
        if not image.isfinite().all():
            spoilt.append(f"{job.prompt[:80]!r}, seed {number}")
            continue
        drawn.setdefault(image.shape[1:], []).append(image)
        if ranks.first and not flags.skip_save:
            shown = replace(job.settings, height=image.shape[1], width=image.shape[2])
            said = describe(shown, vars(flags) | {"prompt": job.prompt, "seed": number}, of_files)
            prompt = fill(template, nouns_of(concepts, settings.noun))
            paths.append(samples.write(png(image, said | {PARAMETERS: parameters(said, prompt)})))
    if not ranks.first:
        return
    if paths:
        many = f"1 image: {paths[0]}" if len(paths) == 1 else f"{len(paths)} images: {paths[0]} to {paths[-1].name}"
        logger.info(many)
    if not flags.skip_grid:
        said = describe(settings, vars(flags) | {"prompt": "\n".join(job.prompt for job in jobs)}, of_files)
        for images in drawn.values():  # a grid of each size
            logger.info("grid: %s", grids.write(png(grid(images, flags.n_rows or flags.n_samples), said)))
    if spoilt:
        raise UserError(
            f"{len(spoilt)} of the images are not written, since they have numbers that are not finite, the first: "
            f"{spoilt[0]}; use --precision full, or lower --scale or --strength"
        )


if __name__ == "__main__":
    main()
