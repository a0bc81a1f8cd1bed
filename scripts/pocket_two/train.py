"""Trains all of the pocket model, part by part, and puts the weights where they belong.

    python -m scripts.pocket_two.train                      # on a CPU: about a day on two cores
    python -m scripts.pocket_two.train --gpu                # on one GPU: larger batches
    python -m scripts.pocket_two.train --only autoencoder
    python -m scripts.pocket_two.train --only xl_text xl    # the same with SDXL's structure, when the rest is done

A part that is done is skipped, one that was interrupted is resumed.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from ldm.util.cli import Parser, report

PARTS = ("autoencoder", "text", "ldm", "classifier", "identity", "clip", "clipseg")  # in the order of need
ALL = (*PARTS, "xl_text", "xl")
LATENTS_GPU = ["data.params.batch_size=512", "data.params.workers=12", "data.params.half_steps=3000"]
GPU = {  # what differs on a GPU: the same number of pictures or more, in larger batches
    "autoencoder": ["data.params.batch_size=256", "data.params.workers=12", "trainer.max_steps=4000"],
    "text": ["data.params.batch_size=256", "trainer.max_steps=2500"],
    "ldm": [*LATENTS_GPU, "trainer.max_steps=8000"],
    "xl_text": ["data.params.batch_size=256", "trainer.max_steps=2500"],
    "xl": [*LATENTS_GPU, "trainer.max_steps=8000"],
    "classifier": ["data.params.batch_size=256", "data.params.workers=12", "trainer.max_steps=3000"],
    "identity": ["data.params.families=32", "data.params.workers=12", "trainer.max_steps=3000"],
    "clip": ["data.params.batch_size=384", "data.params.workers=12", "trainer.max_steps=2000"],
    "clipseg": ["data.params.batch_size=128", "data.params.workers=12", "trainer.max_steps=3000"],
}
DESTINATIONS = {
    "ldm": "pocket",
    "classifier": "classifier",
    "identity": "identity",
    "clip": "clip",
    "clipseg": "clipseg",
    "xl": "xl",
}


def full_precision() -> list[str]:
    """Overrides for a machine that has no arithmetic in bfloat16 and would take ten times as long to imitate it."""
    able = torch.cpu.get_capabilities()
    if torch.cuda.is_available() or able.get("avx512_bf16") or able.get("amx_bf16") or able.get("sve_bf16"):
        return []
    return ["trainer.precision=32-true"]


def train(part: str, runs: Path, overrides: list[str]) -> Path:
    """Runs one part's training to its end, unless that is done; returns its weights."""
    run = runs / part
    weights = run / "models" / "weights.safetensors"
    if not weights.exists():
        if (run / "models" / "last.ckpt").exists():
            arguments = ["--resume", str(run)]
        else:
            shutil.rmtree(run, ignore_errors=True)  # nothing was kept of it
            arguments = ["--base", f"configs/pocket_two/{part}.yaml", "--logdir", str(run), *overrides]
        subprocess.run([sys.executable, "main.py", "-t", *arguments], check=True)
    return weights


@report
def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/pocket"), help="folder of the run folders")
    parser.add_argument("--only", nargs="+", choices=ALL, default=PARTS, help="parts to train")
    parser.add_argument("--out", type=Path, default=Path("ckpt/pocket_two"), help="folder that gets the weights")
    parser.add_argument("--gpu", action="store_true", help="larger batches, for one GPU")
    flags = parser.parse_args()

    needs = {
        "ldm": [
            f"parts.vae={flags.runs}/autoencoder/models/weights.safetensors",
            f"parts.text={flags.runs}/text/models/weights.safetensors",
        ],
        "xl": [
            f"parts.vae={flags.runs}/autoencoder/models/weights.safetensors",
            f"parts.text={flags.runs}/xl_text/models/weights.safetensors",
        ],
        "clipseg": [f"clip={flags.runs}/clip/models/weights.safetensors"],
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    for part in (part for part in ALL if part in flags.only):
        weights = train(part, flags.runs, needs.get(part, []) + (GPU[part] if flags.gpu else full_precision()))
        if part in DESTINATIONS:
            shutil.copyfile(weights, flags.out / f"{DESTINATIONS[part]}.safetensors")


if __name__ == "__main__":
    main()
