"""What a PNG says of how it was made, and how to make it again."""

import logging
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from infusion.sampling.regions import Region
from infusion.sampling.settings import FORMER, Settings
from ldm.util.cli import UserError
from ldm.util.config import find
from ldm.weights.checkpoint import sha256

NEW = ("part", "use_ema")  # flags that older pictures do not have
FLAGS = ("prompt", "target_word", "seed", "config", "ckpt", *NEW, "personalized_ckpt", "covariance")  # and the settings
FILES = ("config", "ckpt", "part", "personalized_ckpt", "covariance")  # of these, those that name files to read
HASHES = ("base_sha256", "personalized_sha256", "covariance_sha256")
KNOWN = (*FORMER, *FLAGS, *(field.name for field in fields(Settings)), *HASHES)
UNREADABLE = (OSError, Image.DecompressionBombError, SyntaxError, ValueError, EOFError, struct.error)  # by Pillow
ONE_EACH = {"n_samples": "1", "n_iter": "1"}
PARAMETERS, NEGATIVE = "parameters", "Negative prompt: "  # of A1111's text, which most tools show
SAMPLERS = {  # ours -> as A1111 calls it
    **{"ddim": "DDIM", "plms": "PLMS", "euler": "Euler", "euler_a": "Euler a"},
    **{"dpmpp_2m": "DPM++ 2M Karras", "unipc": "UniPC"},
}
THEIRS = {"Steps": "steps", "CFG scale": "scale", "Seed": "seed"}  # A1111's names -> ours
PAIR = re.compile(r'([A-Za-z][\w /+-]{0,40}): ("(?:\\.|[^"\\])*"|[^,]*)(?:, |,?$)')
NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,200}>")
logger = logging.getLogger(__name__)


def describe(settings: Settings, flags: Mapping[str, object], hashes: Mapping[str, str]) -> dict[str, str]:
    """The text of a PNG: every flag that its pixels depend on, and hashes of the files that they name."""
    values = {name: flags.get(name) for name in FLAGS} | asdict(settings) | {"region": settings.region}
    if values["target_word"]:
        values["noun"] = None  # which the target word is
    return {name: joined(value) for name, value in values.items()} | dict(hashes)


def joined(value: object) -> str:
    """A flag's value as the flag takes it; "" for None."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={part}" for name, part in value.items())
    if not isinstance(value, Sequence):
        return str(value)
    return (" " if any(isinstance(part, Region) for part in value) else ",").join(map(str, value))


def hashes(base: str | None, concepts: Sequence[str], covariance: str) -> dict[str, str]:
    """SHA-256 of what a picture is made from; `concepts` are files."""
    personalized = ",".join(sha256(find(file)) for file in concepts)
    return dict(zip(HASHES, (base or "", personalized, covariance), strict=True))


def parameters(said: Mapping[str, str], prompt: str) -> str:
    """The same as one text, as A1111 writes it.

    Args:
        said: what `describe` gives.
        prompt: as the text encoder reads it.
    """
    name = Path(said["ckpt"] or said["config"]).stem
    lines = [prompt, NEGATIVE + said["negative_prompt"]] if said["negative_prompt"] else [prompt]
    pairs = {
        "Steps": said["steps"],
        "Sampler": SAMPLERS[said["sampler"]],
        "CFG scale": said["scale"],
        "Seed": said["seed"],
        "Size": f"{said['width']}x{said['height']}",
        "Model hash": said["base_sha256"][:10],
        "Model": re.sub(r"[^\w .+-]", "_", name),
    }
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in pairs.items() if value)])


def read_parameters(text: str) -> tuple[dict[str, str], list[str]]:
    """A1111's text as flags' values, and what it says that no flag takes.

    Prompts may have several lines; the last line has the settings, if it has at least three.
    """
    *lines, last = text.strip().split("\n")
    pairs = dict(PAIR.findall(last))
    if len(pairs) < 3:
        lines, pairs = [*lines, last], {}
    prompt, _, negative = "\n".join(lines).partition(NEGATIVE.strip())
    ignored = NETWORK.findall(prompt)
    said = {"prompt": " ".join(NETWORK.sub(" ", prompt).split()), "negative_prompt": " ".join(negative.split())}
    said |= {THEIRS[name]: pairs.pop(name) for name in THEIRS if name in pairs}
    if size := re.fullmatch(r"(\d+)x(\d+)", pairs.get("Size", "")):
        said |= {"width": size[1], "height": size[2]}
        del pairs["Size"]
    full = " ".join(pairs[name] for name in ("Sampler", "Schedule type") if name in pairs).removesuffix(" Automatic")
    if ours := next((own for own, theirs in SAMPLERS.items() if theirs == full), None):
        said["sampler"] = ours
        pairs = {name: value for name, value in pairs.items() if name not in ("Sampler", "Schedule type")}
    return said, [*ignored, *(f"{name}: {value}" for name, value in pairs.items())]


def recall(path: str | Path) -> dict[str, str]:
    """The text of a PNG of ours: what `describe` writes, and nothing else that may stand there; or of A1111's.

    Only its head is read, up to the pixels. Some values name files, which are read as if they had been named by flags:
    config, ckpt, part, personalized_ckpt and covariance. None names a file or folder to write to. Of A1111's text, a
    warning names what is ignored.

    Raises:
        ValueError: the file cannot be read, does not say how it was made, or names a file of another machine.
    """
    try:
        with PngImageFile(path) as image:  # which, other than Image.open, takes any size: the pixels are not read
            info = {name: value for name, value in image.info.items() if isinstance(value, str)}
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot be read as a picture ({reason})") from error
    said = {FORMER.get(name, name): str(info[name]) for name in KNOWN if name in info}
    if not said and info.get(PARAMETERS, "").strip():
        said, ignored = read_parameters(info[PARAMETERS])
        if ignored:
            shown = "; ".join(ignored)[:600].encode("ascii", "replace").decode()
            logger.warning("warning: --from-png: %s: ignored: %s", path, " ".join(shown.split()))
        return said
    if lacking := [name for name in (*FLAGS, *asdict(Settings())) if name not in {*said, *NEW}]:
        raise UserError(f"{path}: does not say how it was made ({lacking[0]} is lacking)")
    for name in FILES:
        if any(_elsewhere(file) for file in _files(name, said.get(name, ""))):
            raise UserError(f"{path}: its {name} names no file of this machine: {said[name][:80]!r}")
    return said


def _files(name: str, value: str) -> list[str]:
    """The files that a flag's value names."""
    parts = value.split(",")
    return [part.partition("=")[2] for part in parts] if name == "part" else parts


def _elsewhere(name: str) -> bool:
    """Whether a name is an address, another machine's folder, or several lines, and no plain file."""
    return "\n" in name or "://" in name or name.startswith(("//", "\\\\"))


def defaults(text: Mapping[str, str]) -> dict[str, str | bool]:
    """What `recall` gives, as defaults of the sampling command's flags; what is empty has the usual default."""
    said = {name: text[name] for name in (*FLAGS, *asdict(Settings())) if text.get(name)}
    averages = {"use_ema": said["use_ema"] == str(True)} if "use_ema" in said else {}
    return said | averages | ONE_EACH
