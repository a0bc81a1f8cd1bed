"""Checks the weights that an experiment on SD 1.5 reads, and says what to fetch (docs/weights.md).

python scripts/weights.py                   # or: --ckpt DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.util.cli import Parser, UserError, report
from ldm.util.config import find
from ldm.util.digests import sha256

SD15 = "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"
WEIGHTS = {  # files of which one is needed -> repository of Hugging Face, SHA-256 or "" where no source has one
    ("v1-5-pruned-emaonly.safetensors",): ("stable-diffusion-v1-5/stable-diffusion-v1-5", SD15),
    ("clip-vit-large-patch14/model.safetensors",): (
        "openai/clip-vit-large-patch14",
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    ),
    ("dino-vits16/pytorch_model.bin", "dino-vits16/model.safetensors"): ("facebook/dino-vits16", ""),
    ("clipseg-rd64-refined/model.safetensors", "clipseg-rd64-refined/pytorch_model.bin"): (
        "CIDAS/clipseg-rd64-refined",
        "",
    ),
}


def fault(names: tuple[str, ...], folder: Path, source: str, published: str) -> str:
    """What is wrong with a file and, in a folder of its own, its config.json; "" if nothing is."""
    files = [folder / name for name in names]
    file = next((file for file in files if file.is_file()), files[0])
    for one in (file, file.with_name("config.json")):
        if not one.is_file() and (one == file or file.parent != folder):
            return f"there is no {one}: put it there from huggingface.co/{source}"
    found = sha256(file)
    if published and found != published:
        return f"{file} has the sha256 {found} instead of {published}: fetch it again"
    print(f"{file}: sha256 {found}{', as published' if published else f'; compare it with {source}'}")
    return ""


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description="Checks the weights that an experiment on SD 1.5 reads.")
    parser.add_argument("--ckpt", metavar="DIR", help="folder of weights", default="ckpt")
    folder = find(parser.parse_args(arguments).ckpt)
    faults = [found for names, known in WEIGHTS.items() if (found := fault(names, folder, *known))]
    for found in faults[:-1]:
        print(found, file=sys.stderr)
    if faults:
        raise UserError(faults[-1])


if __name__ == "__main__":
    main()
