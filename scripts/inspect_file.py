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
        return found | describe(path)
    return found | ({"as_concept": summary(path)} if found["kind"] in ADAPTERS else {})


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description="Prints what a file of tensors, a folder or a picture holds as JSON.")
    parser.add_argument("file", metavar="FILE", help="a .safetensors or .ckpt file, a run or diffusers folder, a PNG")
    flags = parser.parse_args(arguments)
    file, start = concept_file(flags.file), b""
    if file.is_file():
        with file.open("rb") as content:
            start = content.read(len(PNG))
    print(json.dumps(recipe(file) if start == PNG else facts(file), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
