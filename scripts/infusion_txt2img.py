"""Draws prompts with a learned concept: `{}` in a prompt is the concept.

python scripts/infusion_txt2img.py --personalized_ckpt cat.safetensors --prompt "a photo of a {} on the beach"
"""

import argparse
import logging
import sys
import warnings
from dataclasses import asdict, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from infusion.concept import Concept
from infusion.covariance import InverseCovariance
from infusion.generate import Settings, check_prompts, generate
from infusion.pictures import Numbered, grid, png
from infusion.sampling import check_covariance
from ldm.config import ROOT, find
from ldm.errors import Parser, UserError, report
from ldm.flags import count, find_device, number, numbers, seed
from ldm.pipeline import StableDiffusion
from ldm.schedule import SAMPLERS

logger = logging.getLogger(__name__)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    usual = Settings()
    parser = Parser(description="Draws prompts with a learned concept.")
    add = parser.add_argument
    add("--config", metavar="FILE", help="backbone config; None: the one that the concept file names")
    add("--ckpt", metavar="FILE", help="weights of the base model; None: the backbone's usual file")
    add("--personalized_ckpt", metavar="A[,B]", help="concept file; None: the base model alone, which needs --config")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="{} is the concept", default="a photo of a {}")
    prompts.add_argument("--from-file", metavar="FILE", help="prompts, one a line, in place of --prompt")
    add("--negative_prompt", help="what to guide away from", default=usual.negative_prompt)
    add("--beta", type=numbers, metavar="B[,B]", help="similarity at which the gate is half open", default=usual.beta)
    add("--tau", type=numbers, metavar="T[,T]", help="temperature of the gate, above 0", default=usual.tau)
    add("--strength", type=numbers, metavar="S[,S]", help="factor on what was learned", default=usual.strength)
    add("--covariance", metavar="FILE", help="C⁻¹ that the concept was trained with; None: the identity")
    add("--scale", type=number, help="classifier-free guidance; 1 is none", default=usual.scale)
    add("--steps", "--ddim_steps", type=count, help="sampling steps", default=usual.steps)
    add("--ddim_eta", type=number, help="share of DDIM's noise; 0 is deterministic", default=usual.ddim_eta)
    add("--sampler", choices=list(SAMPLERS), help="the sampler", default=usual.sampler)
    add("--n_samples", type=count, help="images of a prompt at a time", default=4)
    add("--n_iter", type=count, help="how often to go through the prompts", default=1)
    add("--n_rows", type=count, metavar="N", help="images in a row of the grid; None: --n_samples")
    add("--H", type=count, metavar="PIXELS", help="height; None: the size that the base model was trained on")
    add("--W", type=count, metavar="PIXELS", help="width; None: likewise")
    add("--seed", type=seed, help="of the first image; image i has the seed + i", default=42)
    add("--precision", choices=["full", "autocast"], help="of the UNet", default=usual.precision)
    add("--outdir", metavar="DIR", help="gets samples/00000.png … and grid-0000.png", default="outputs/txt2img")
    add("--skip_grid", action="store_true", help="write no grid")
    add("--skip_save", action="store_true", help="write no single images")
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    flags = parser.parse_args(arguments)
    if flags.covariance and not flags.personalized_ckpt:
        parser.error("--covariance: weighs the gate of a concept, and no --personalized_ckpt is given")
    if flags.skip_grid and flags.skip_save:
        parser.error("--skip_grid and --skip_save together leave nothing to write")
    return flags


def read_prompts(flags: argparse.Namespace) -> list[str]:
    if flags.from_file is None:
        return [flags.prompt]
    try:
        lines = Path(flags.from_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--from-file: {flags.from_file} cannot be read as text ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--from-file: {flags.from_file} has no prompt in it")
    return prompts


def read_concepts(flags: argparse.Namespace) -> dict[str, Concept]:
    """Concepts by their files' names as given."""
    files = [name for name in (flags.personalized_ckpt or "").split(",") if name]
    return {name: Concept.load(find(name)) for name in files}


def find_config(flags: argparse.Namespace, concepts: list[Concept]) -> Path:
    if flags.config:
        return find(flags.config)
    if not concepts:
        raise UserError("--personalized_ckpt: name a concept file, or name a backbone by --config to draw without one")
    path = ROOT / "configs" / "backbone" / f"{concepts[0].architecture}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        base = concepts[0].architecture
        raise UserError(f"--config: the concept was trained on {base!r}, which is none of {known}: name its config")
    return path


def joined(value: object) -> object:
    return ",".join(map(str, value)) if isinstance(value, list) else value


@report
def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    flags = parse(arguments)
    prompts, files = read_prompts(flags), read_concepts(flags)
    concepts, inverse = list(files.values()), InverseCovariance(flags.covariance)
    check_covariance(concepts, inverse.matrix)
    outdir = Path(flags.outdir)
    samples, grids = Numbered(outdir / "samples"), Numbered(outdir, "grid-", digits=4)
    device = find_device(flags.device)
    sd = StableDiffusion.from_checkpoint(find_config(flags, concepts), flags.ckpt and find(flags.ckpt), device=device)
    settings = Settings(**{field.name: getattr(flags, field.name) for field in fields(Settings)})
    check_prompts(sd, prompts, concepts)
    if concepts and not all("{" in prompt for prompt in prompts):
        logger.warning("warning: a prompt without {} is drawn by the base model: the concept is not in it")

    batches = [prompt for _ in range(flags.n_iter) for prompt in prompts]
    _, rows, columns = sd.latent_shape(flags.H, flags.W)
    known = {name: joined(value) for name, value in asdict(settings).items()} | {
        "H": rows * sd.vae.factor,
        "W": columns * sd.vae.factor,
        "personalized_ckpt": ",".join(files),
        "covariance": inverse.fingerprint,
        "superclass": ",".join(concept.superclass for concept in concepts),
        "base": sd.architecture,
        "base_sha256": sd.hash,
    }
    drawn, paths = [], []
    for index, prompt in enumerate(tqdm(batches, "prompts", disable=len(batches) == 1)):
        seeds = [flags.seed + index * flags.n_samples + i for i in range(flags.n_samples)]
        images, _ = generate(
            *(sd, [prompt] * flags.n_samples, seeds, concepts, settings),
            progress=len(batches) == 1,
            inverse_covariance=inverse.matrix,
        )
        drawn += images.cpu()
        if not flags.skip_save:
            texts = ({"prompt": prompt, "seed": seed} | known for seed in seeds)
            paths += [samples.write(png(image, text)) for image, text in zip(images, texts, strict=True)]
    if paths:
        many = f"1 image: {paths[0]}" if len(paths) == 1 else f"{len(paths)} images: {paths[0]} to {paths[-1].name}"
        logger.info(many)
    if not flags.skip_grid:
        text = {"prompt": "\n".join(prompts), "seed": flags.seed} | known
        logger.info("grid: %s", grids.write(png(grid(drawn, flags.n_rows or flags.n_samples), text)))


if __name__ == "__main__":
    main()
