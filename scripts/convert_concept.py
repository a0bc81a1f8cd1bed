"""Converts a concept file into another form, or a concept of Infusion's released code into a concept file.

python scripts/convert_concept.py cat.safetensors cat-compact.safetensors --form compact
python scripts/convert_concept.py released.ckpt cat.safetensors --superclass cat
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infusion.concepts import FORMS
from ldm.util.cli import Parser, UserError, report
from ldm.util.config import backbones

if TYPE_CHECKING:
    from infusion.concepts.concept import Concept

UNSAID = ("superclass", "templates", "architecture", "gate", "attention", "values_only")  # by a released .ckpt


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Converts a concept file into another form. No file is overwritten.")
    add = parser.add_argument
    add("source", metavar="IN", help="a concept file of any form, or a concept .ckpt of Infusion's released code")
    add("target", metavar="OUT", help="the new file, ending in .safetensors")
    add("--form", choices=FORMS, help="full: float32; half: float16; compact: at most 11,264 bytes", default="full")
    said = parser.add_argument_group("what a released .ckpt does not say").add_argument
    said("--superclass", metavar="WORD", help="the noun that stands for the concept in prompts; needed for a .ckpt")
    said("--templates", nargs="+", metavar="PROMPT", help="training prompts; None: a photo of a {}")
    said(
        "--architecture", choices=list(backbones()), help="of the base model; None: by the width of its text encodings"
    )
    said("--gate", choices=["sigmoid", "hard", "global"], help="None: hard, which is what the released code does")
    said("--attention", choices=["foundation", "own"], help="None: own, which is what the released code does")
    said("--values_only", action="store_true", help="leave out residual keys")
    return parser.parse_args(arguments)


def read(flags: argparse.Namespace) -> "Concept":
    from infusion.concepts import released  # after the flags: it takes seconds
    from infusion.concepts.concept import Concept
    from ldm.weights.files import TensorFile

    said = {name: getattr(flags, name) for name in UNSAID if getattr(flags, name)}
    with TensorFile(flags.source) as file:
        pickled = file.format != "safetensors"
    if not pickled and said:
        raise UserError(f"--{next(iter(said))}: {flags.source} is a concept file, which says so itself")
    if not pickled:
        return Concept.load(flags.source)
    if "superclass" not in said:
        raise UserError(f"--superclass: {flags.source} does not say what stands for the concept in prompts; name it")
    return released.load(flags.source, **said)


def write(concept: "Concept", path: Path, form: str) -> None:
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: the name must end in .safetensors")
    if path.exists() or path.is_symlink():
        raise UserError(f"{path}: is there already; name another file, or remove it first")
    try:
        concept.save(path, form)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


@report
def main(arguments: list[str] | None = None) -> None:
    flags = parse(arguments)
    from infusion.concepts.concept import Concept

    concept, path = read(flags), Path(flags.target)
    write(concept, path, flags.form)
    if flags.values_only:
        print("residual keys, if there were any, are left out")
    error = Concept.load(path).relative_error(concept)
    print(
        f"{path}: {flags.form}, {path.stat().st_size:,} bytes, {concept.numbers:,} numbers, relative error {error:.1e}"
    )


if __name__ == "__main__":
    main()
