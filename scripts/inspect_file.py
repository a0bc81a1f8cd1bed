"""Prints what a file holds as JSON: a base checkpoint, a concept file, a LoRA or other adapter, a diffusers folder, how
a PNG was made, or what else it looks like.

python scripts/inspect_file.py ckpt/v1-5-pruned-emaonly.safetensors
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infusion.concepts.runs import concept_file
from ldm.util.cli import Parser, UserError, report

PNG = b"\x89PNG\r\n\x1a\n"
ADAPTERS = ("lora", "textual inversion", "custom diffusion")  # kinds of files of other tools that are concepts


def is_png(path: Path) -> bool:
    """Whether a file begins as a PNG does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(PNG)) == PNG


def recipe(path: Path) -> dict[str, Any]:
    """How a picture says that it was made, by the names of the sampling command's flags."""
    from infusion.sampling.png import recall  # after the flags: it takes seconds
    from ldm.weights.checkpoint import sha256

    found = {"file": str(path), "format": "png", "bytes": path.stat().st_size, "sha256": sha256(path)}
    found |= {"kind": "picture", "says": "a picture that says how it was made: --from-png draws it again"}
    try:
        return found | {"made": recall(path)}
    except UserError as error:
        return found | {"says": f"a picture: {error}"}


def facts(path: Path) -> dict[str, Any]:
    """What a file of tensors, or a folder, holds."""
    from infusion.concepts.file import describe  # after the flags: it takes seconds
    from infusion.concepts.others import summary
    from ldm.weights.recognise import inspect

    found = inspect(path)
    if found["kind"] == "concept":
        found |= describe(path)
    if found["kind"] in ADAPTERS:
        found["as_concept"] = summary(path)
    return found


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description="Prints what a file of tensors, a folder or a picture holds as JSON.")
    parser.add_argument("file", metavar="FILE", help="a .safetensors or .ckpt file, a run or diffusers folder, a PNG")
    flags = parser.parse_args(arguments)
    file = concept_file(flags.file)
    print(json.dumps(recipe(file) if is_png(file) else facts(file), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
