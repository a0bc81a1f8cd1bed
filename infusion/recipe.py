"""What a PNG says of how it was made, and how to make it again."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from infusion.regions import Region
from infusion.settings import Settings
from ldm.checkpoint import sha256
from ldm.config import find

FLAGS = ("prompt", "target_word", "seed", "config", "ckpt", "personalized_ckpt", "covariance")  # beside the settings
ONE_EACH = {"n_samples": "1", "n_iter": "1"}


def describe(settings: Settings, flags: Mapping[str, object], hashes: Mapping[str, str]) -> dict[str, str]:
    """The text of a PNG: every flag that its pixels depend on, and hashes of the files that they name."""
    values = {name: flags.get(name) for name in FLAGS} | asdict(settings) | {"region": settings.region}
    return {name: joined(value) for name, value in values.items()} | dict(hashes)


def joined(value: object) -> str:
    """A flag's value as the flag takes it; "" for None."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, Sequence):
        return str(value)
    return (" " if any(isinstance(part, Region) for part in value) else ",").join(map(str, value))


def hashes(base: str | None, concepts: Sequence[str], covariance: str) -> dict[str, str]:
    """SHA-256 of what a picture is made from; `concepts` are files."""
    personalized = ",".join(sha256(find(file)) for file in concepts)
    return {"base_sha256": base or "", "personalized_sha256": personalized, "covariance_sha256": covariance}


def recall(path: str | Path) -> dict[str, str]:
    """The text of a PNG of ours.

    Raises:
        ValueError: the file cannot be read, or does not say how it was made.
    """
    try:
        with Image.open(path) as image:
            text = dict(getattr(image, "text", {}))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from error
    if lacking := [name for name in (*FLAGS, *asdict(Settings())) if name not in text]:
        raise ValueError(f"{path}: does not say how it was made ({lacking[0]} is lacking)")
    return text


def defaults(text: Mapping[str, str]) -> dict[str, str]:
    """What `recall` gives, as defaults of the sampling command's flags; what is empty has the usual default."""
    return {name: text[name] for name in (*FLAGS, *asdict(Settings())) if text[name]} | ONE_EACH
