"""Converts a concept into another form, or into the files of other tools, and those into a concept file.

python scripts/convert_concept.py cat.safetensors cat-compact.safetensors --form compact
python scripts/convert_concept.py lora.safetensors --to kohya
python scripts/convert_concept.py downloaded.safetensors cat.safetensors --superclass cat
"""

import argparse
import base64
import io
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from infusion.concepts import FORMS
from infusion.concepts.base import check_there, check_weights, load_base
from infusion.concepts.runs import concept_file
from ldm.util.cli import Parser, UserError, add_base_flags, find_device, naming, report
from ldm.util.config import BACKBONES, backbones, find
from ldm.util.templates import bare

if TYPE_CHECKING:
    from infusion.concepts.concept import Concept

OURS, LAYOUTS = "infusion", ("infusion", "kohya", "diffusers", "a1111", "folder", "checkpoint")
WORDS = ("superclass", "noun", "templates", "architecture")  # that another file may not say
RELEASED = ("gate", "attention", "values_only")  # besides, of a released .ckpt
SPEC = ("author", "license", "tags", "description")  # of ModelSpec; and a thumbnail
SIDE = 256  # pixels of a thumbnail


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Converts a concept into another form or layout. No file is overwritten.")
    add = parser.add_argument
    add("source", metavar="IN", help="a concept file, or a file or folder of another tool (docs/files.md)")
    add("target", metavar="OUT", nargs="?", help="new file or folder; None: <superclass>-<method>-<steps> beside IN")
    add("--to", choices=LAYOUTS, help="the layout; infusion is a concept file of this project", default=OURS)
    add("--form", choices=FORMS, help="full: float32; half: float16; compact: at most 11,264 bytes", default="full")
    said = parser.add_argument_group("what IN does not say").add_argument
    about = "the noun that stands for the concept in prompts; needed for a .ckpt"
    said("--superclass", metavar="WORD", type=bare, help=about)
    said("--noun", metavar="WORDS", help="its trigger words; None: as IN says")
    said("--templates", nargs="+", metavar="PROMPT", help="training prompts; None: a photo of a {}")
    said("--architecture", choices=list(backbones()), help="of the base model; None: by widths and metadata")
    said("--gate", choices=["sigmoid", "hard", "global"], help="of a released .ckpt; None: hard, as that code does")
    said("--attention", choices=["foundation", "own"], help="of a released .ckpt; None: own, as that code does")
    said("--values_only", action="store_true", help="leave out residual keys of a released .ckpt")
    spec = parser.add_argument_group("what others should know of OUT (ModelSpec, model card)").add_argument
    for name in SPEC:
        spec(f"--{name}", metavar="TEXT", help="a text")
    spec("--thumbnail", metavar="FILE", help="a picture, which is made small")
    spec("--card", action="store_true", help="write a model card beside OUT")
    base = parser.add_argument_group("the base model, for layouts of whole weights")
    base.add_argument("--config", metavar="FILE", help="backbone config; None: the one that the concept names")
    add_base_flags(base)
    flags = parser.parse_args(arguments)
    if flags.form == "compact" and flags.to != OURS:
        parser.error("--form: compact is a form of this project's own files")
    return flags


def read(flags: argparse.Namespace) -> "Concept":
    from infusion.concepts import released  # after the flags: it takes seconds
    from infusion.concepts.concept import Concept
    from ldm.weights.files import TensorFile
    from ldm.weights.recognise import recognise

    flags.source = str(concept_file(flags.source))
    said = {name: getattr(flags, name) for name in (*WORDS, *RELEASED) if getattr(flags, name)}
    is_released = False
    if Path(flags.source).is_file():
        with TensorFile(flags.source) as file:
            is_released = recognise(file).name == "released concept"
    for name in ("noun",) if is_released else RELEASED:
        if name in said:
            what = "a" if is_released else "no"
            raise UserError(f"--{name}: {flags.source} is {what} concept of the released code, so leave the flag out")
    if not is_released:
        return Concept.load(flags.source, **said)
    if "superclass" not in said:
        raise UserError(f"--superclass: {flags.source} does not say what stands for the concept; name it")
    return released.load(flags.source, **said)


def describe(flags: argparse.Namespace) -> dict[str, str]:
    """What the flags, or else the metadata of IN, say for others to read."""
    from infusion.concepts.fields import check_text
    from ldm.weights.files import TensorFile

    metadata = {}
    if Path(flags.source).is_file():
        with TensorFile(flags.source) as file:
            metadata = file.metadata
    said = {name: getattr(flags, name) or metadata.get(f"modelspec.{name}") or "" for name in SPEC}
    for name, text in said.items():
        check_text(f"--{name}", text)
    said["thumbnail"] = picture(flags.thumbnail) if flags.thumbnail else metadata.get("modelspec.thumbnail")
    return {name: text for name, text in said.items() if text}


def picture(file: str) -> str:
    """A picture as a small data URL."""
    from PIL import Image

    from infusion.sampling.png import UNREADABLE

    try:
        with Image.open(file) as image:
            image.thumbnail((SIDE, SIDE))
            content = io.BytesIO()
            image.convert("RGB").save(content, "JPEG", quality=85)
    except UNREADABLE as error:
        raise UserError(f"--thumbnail: {file} cannot be read as a picture") from error
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def find_target(flags: argparse.Namespace, concept: "Concept") -> Path:
    """Where to write; raises UserError for a name that is taken or has another ending."""
    from infusion.concepts.write import default_name

    folder = flags.to == "folder" or (flags.to == "diffusers" and concept.method == "custom_diffusion")
    ending = "" if folder else ".safetensors"
    path = Path(flags.target) if flags.target else Path(flags.source).parent / default_name(concept, ending)
    if not folder and path.is_dir():
        path = path / default_name(concept, ending)
    if not folder and path.suffix != ending:
        raise UserError(f"{path}: the name must end in .safetensors")
    for taken in (path, card_of(path, folder)) if flags.card else (path,):
        if taken.exists() or taken.is_symlink():
            raise UserError(f"{taken}: is there already; name another file, or remove it first")
    return path


def card_of(path: Path, folder: bool) -> Path:
    return path / "README.md" if folder else path.with_suffix(".md")


def write(flags: argparse.Namespace, concept: "Concept", path: Path, said: dict[str, str]) -> None:
    import torch

    from infusion.concepts import write as other

    if flags.to == OURS:
        stored = {name: tensor.half() if flags.form == "half" else tensor for name, tensor in concept.tensors.items()}
        complete = said or (flags.form != "compact" and concept.architecture in backbones())
        concept.save(path, flags.form, other.spec(concept, said, stored) if complete else None)
        return
    base = None
    if other.needs_base(concept, flags.to):
        config = find(flags.config) if flags.config else BACKBONES / f"{concept.architecture}.yaml"
        check_weights(flags, config)
        base = load_base(flags, config, [concept], find_device("cpu"))
        concept.check_base(base.architecture, base.hash)
    with torch.no_grad():
        other.write(concept, path, flags.to, said, base, half=flags.form == "half")


@report
def main(arguments: list[str] | None = None) -> None:
    flags = parse(arguments)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    check_there("thumbnail", flags.thumbnail)
    from infusion.concepts import write as other
    from infusion.concepts.concept import Concept
    from ldm.util import files

    concept = read(flags)
    if flags.to != OURS:
        with naming(f"--to: {flags.source}"):
            other.check_layout(concept, flags.to)
    said, path = describe(flags), find_target(flags, concept)
    write(flags, concept, path, said)
    if flags.card:
        files.create(card_of(path, path.is_dir()), other.card(concept, said).encode())
    if flags.values_only:
        print("residual keys, if there were any, are left out")
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")))
    kind = flags.form if flags.to == OURS else f"{flags.to}, {flags.form}"
    error = f", relative error {Concept.load(path).relative_error(concept):.1e}" if flags.to == OURS else ""
    print(f"{path}: {kind}, {size:,} bytes, {concept.numbers:,} numbers{error}")


if __name__ == "__main__":
    main()
