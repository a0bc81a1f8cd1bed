"""Prints what a file holds as JSON: a base checkpoint, a concept file, a LoRA or other adapter, a diffusers folder, or
what else it looks like.

python scripts/inspect_file.py ckpt/v1-5-pruned-emaonly.safetensors
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.util.cli import Parser, report

ADAPTERS = ("lora", "textual inversion", "custom diffusion")  # kinds of files of other tools that are concepts


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description="Prints what a file of tensors, or a diffusers folder, holds as JSON.")
    parser.add_argument("file", metavar="FILE", help="a .safetensors or .ckpt file, or a diffusers folder")
    flags = parser.parse_args(arguments)
    from infusion.concepts.file import describe  # after the flags: it takes seconds
    from infusion.concepts.others import summary
    from ldm.weights.recognise import inspect

    facts = inspect(flags.file)
    if facts["kind"] == "concept":
        facts |= describe(flags.file)
    if facts["kind"] in ADAPTERS:
        facts["as_concept"] = summary(flags.file)
    print(json.dumps(facts, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
