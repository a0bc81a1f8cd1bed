"""Checks the weights that an experiment on SD 1.5 reads, and says what to fetch (docs/weights.md).

python scripts/weights.py                   # or: --ckpt DIR
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.util.cli import Parser, UserError, report
from ldm.util.config import find
from ldm.util.digests import sha256


@dataclass(frozen=True)
class Weights:
    """A file that is fetched from a repository of Hugging Face, with `beside` it.

    Attributes:
        path: in the folder of weights. size: in bytes. sha256: "" where no source for it is known to us.
    """

    path: str
    source: str
    sha256: str = ""
    size: int = 0
    beside: tuple[str, ...] = ()


SD15 = (
    Weights(
        "v1-5-pruned-emaonly.safetensors",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
        4_265_146_304,
    ),
    Weights(
        "clip-vit-large-patch14/model.safetensors",
        "openai/clip-vit-large-patch14",
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
        1_710_540_580,
        ("config.json",),
    ),
    Weights("dino-vits16/pytorch_model.bin", "facebook/dino-vits16", beside=("config.json",)),
    Weights("clipseg-rd64-refined/model.safetensors", "CIDAS/clipseg-rd64-refined", beside=("config.json",)),
)


def fault(weights: Weights, folder: Path) -> str:
    """What is wrong with a file; "" if nothing is."""
    path = folder / weights.path
    same = [path, path.with_name("pytorch_model.bin"), path.with_name("model.safetensors")]
    file = path if weights.sha256 else next((one for one in same if one.is_file()), path)
    for one in (file, *(file.with_name(name) for name in weights.beside)):
        if not one.is_file():
            return f"there is no {one}: put it there from huggingface.co/{weights.source}"
    if weights.size and file.stat().st_size != weights.size:
        return f"{file} has {file.stat().st_size:,} bytes instead of {weights.size:,}: fetch it again"
    found = sha256(file)
    if weights.sha256 and found != weights.sha256:
        return f"{file} has the sha256 {found} instead of {weights.sha256}: fetch it again"
    print(f"{file}: sha256 {found}{', as published' if weights.sha256 else f'; compare it with {weights.source}'}")
    return ""


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description="Checks the weights that an experiment on SD 1.5 reads.")
    parser.add_argument("--ckpt", metavar="DIR", help="folder of weights", default="ckpt")
    folder = find(parser.parse_args(arguments).ckpt)
    faults = [found for weights in SD15 if (found := fault(weights, folder))]
    for found in faults[:-1]:
        print(found, file=sys.stderr)
    if faults:
        raise UserError(faults[-1])


if __name__ == "__main__":
    main()
