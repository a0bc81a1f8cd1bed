"""Samples Stable Diffusion with a learned concept: `{}` in a prompt is the concept."""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from infusion.concept import Concept  # noqa: E402
from ldm.errors import Parser, UserError, report  # noqa: E402
from ldm.images import grid, numbered, save_png  # noqa: E402
from ldm.pipeline import StableDiffusion  # noqa: E402
from ldm.schedule import SAMPLERS  # noqa: E402

HALF = {"cuda": torch.float16, "cpu": torch.bfloat16}  # what --precision autocast computes in


def numbers(text: str) -> list[float]:
    """`0.7` or `0.7,0.5`."""
    return [float(word) for word in text.split(",")]


def parse() -> object:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--config", help="backbone config (default: that of the concept's architecture)")
    add("--ckpt", help="weights of the base model (default: the backbone's usual file)")
    add("--personalized_ckpt", metavar="A[,B]", help="concept files; none samples the base model", default="")
    add("--prompt", help="{} is the concept; with several, {1}, {2}, …", default="a photo of a {}")
    add("--from-file", metavar="FILE", help="prompts, one a line, in place of --prompt")
    add("--negative_prompt", help="what to guide away from", default="")
    add("--beta", type=numbers, metavar="B[,B]", help="gate: similarity at which it is half open; 0.7 unless given")
    add("--tau", type=numbers, metavar="T[,T]", help="gate: temperature; 0.15 unless given")
    add("--strength", type=numbers, metavar="S[,S]", help="factor on the concept's residual; 1 unless given")
    add("--scale", type=float, help="classifier-free guidance; 1 is none", default=7.5)
    add("--steps", "--ddim_steps", type=int, help="sampling steps", default=50)
    add("--ddim_eta", type=float, help="share of DDIM's noise, 0 to 1", default=0.0)
    add("--sampler", choices=list(SAMPLERS), help="which scheduler", default="ddim")
    add("--n_samples", type=int, help="images for each prompt, and at a time", default=4)
    add("--n_iter", type=int, help="how often to go through the prompts", default=1)
    add("--n_rows", type=int, help="columns of the grid; 0 is n_samples", default=0)
    add("--H", type=int, help="height in pixels (default: the base model's)")
    add("--W", type=int, help="width in pixels (default: the base model's)")
    add("--seed", type=int, help="image i has the seed SEED + i", default=42)
    add("--precision", choices=["full", "autocast"], help="float32, or half precision where it is safe", default="full")
    add(
        "--outdir",
        type=Path,
        help="samples/ and grids go here; nothing there is overwritten",
        default="outputs/txt2img",
    )
    add("--skip_grid", action="store_true", help="write no grid")
    add("--skip_save", action="store_true", help="write no single images")
    add("--device", help="cuda, cpu, mps", default="cuda" if torch.cuda.is_available() else "cpu")
    flags = parser.parse_args()
    for name in ("n_samples", "n_iter"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name}: must be at least 1, not {getattr(flags, name)}")
    return flags


def read_prompts(flags: object) -> list[str]:
    if not flags.from_file:
        return [flags.prompt]
    try:
        lines = Path(flags.from_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--from-file: cannot read {flags.from_file}: {error}") from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"--from-file: {flags.from_file} has no prompt")
    return prompts


@report
def main() -> None:
    flags = parse()
    concepts = [Concept.load(path) for path in flags.personalized_ckpt.split(",") if path]
    architecture = concepts[0].architecture if concepts else "sd15"
    config = flags.config or ROOT / "configs" / "backbone" / f"{architecture}.yaml"
    prompts = [prompt for _ in range(flags.n_iter) for prompt in read_prompts(flags) for _ in range(flags.n_samples)]
    sd = StableDiffusion.from_checkpoint(config, flags.ckpt, flags.device)
    options = {"steps": flags.steps, "scale": flags.scale, "negative_prompt": flags.negative_prompt,
               "eta": flags.ddim_eta, "sampler": flags.sampler, "height": flags.H, "width": flags.W,
               "beta": flags.beta, "tau": flags.tau, "strengths": flags.strength}  # fmt: skip
    about = {"concepts": flags.personalized_ckpt, "base": sd.architecture, "base_sha256": sd.hash or "",
             "precision": flags.precision, **options}  # fmt: skip
    device = torch.device(flags.device).type
    autocast = nullcontext() if flags.precision == "full" else torch.autocast(device, HALF.get(device, torch.float16))

    paths, images = numbered(flags.outdir / "samples", "{:05d}.png"), []
    for start in range(0, len(prompts), flags.n_samples):
        batch, seed = prompts[start : start + flags.n_samples], flags.seed + start
        with autocast:
            drawn = sd.sample(batch, concepts, seed=seed, progress=True, **options).cpu()
        if not flags.skip_save:
            for i, image in enumerate(drawn):
                save_png(image, next(paths), {"prompt": batch[i], "seed": seed + i} | about)
        images.append(drawn)
    if not flags.skip_grid:
        path = next(numbered(flags.outdir, "grid-{:04d}.png"))
        save_png(
            grid(torch.cat(images), flags.n_rows or flags.n_samples),
            path,
            {"prompts": prompts, "seed": flags.seed} | about,
        )
    print(f"{len(prompts)} images in {flags.outdir}")


if __name__ == "__main__":
    main()
