"""Where other tools' names lead in a base model, and which base model their files are for."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infusion.concepts.concept import MODELSPEC_ARCHITECTURES
from infusion.concepts.fields import WORD, shown
from ldm.models.text import ClipText, OpenClipText
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError
from ldm.util.config import instantiate
from ldm.weights import recognise
from ldm.weights.diffusers_layout import Folder, diffusers_names
from ldm.weights.files import TensorFile

logger = logging.getLogger(__name__)
ENCODERS = ("te", "te2")  # what a model's text encoders are called here, in their order
VERSIONS = {"sd_v1": "sd15", "sd_v2": "sd21", "sd_v2_v": "sd21_768", "sdxl_base_v1-0": "sdxl"}  # by sd-scripts
SPECS = {theirs: ours for ours, theirs in MODELSPEC_ARCHITECTURES.items()}


@dataclass(frozen=True)
class Place:
    """A tensor of the base model, by its name in a concept, or one of the `parts` below each other that it is of."""

    tensor: str
    part: int = 0
    parts: int = 1


@cache
def skeleton(architecture: str) -> StableDiffusion:
    """A base model without values.

    Raises:
        ValueError: there is no such backbone.
    """
    known = recognise.backbones()
    if architecture not in known:
        raise UserError(f"the base model must be one of {', '.join(known)}, not {shown(architecture)}")
    with torch.device("meta"):
        return instantiate(known[architecture], "sd")


def encoders(sd: StableDiffusion) -> dict[str, tuple[str, nn.Module]]:
    """ "te", "te2" -> a text encoder's place in the model and itself."""
    found = [(path, part) for path, part in sd.named_modules() if isinstance(part, ClipText | OpenClipText)]
    return dict(zip(ENCODERS, found, strict=False))


def modules(sd: StableDiffusion, ending: str = ".weight") -> Iterator[tuple[Place, str, str, str]]:
    """Of every tensor of UNet and text encoders with that ending: place, part ("unet", "te" or "te2"), and the names of
    its module as diffusers has it and as LDM has it."""
    for part, (path, module) in {"unet": ("", sd.unet), **encoders(sd)}.items():
        for ours, theirs in diffusers_names(module).items():
            for i, name in enumerate(theirs):
                if name.endswith(ending):
                    place = Place(f"{path}.{ours}" if path else ours, i, len(theirs))
                    yield place, part, name.removesuffix(ending), ours.removesuffix(ending)


def places(sd: StableDiffusion, ending: str = ".weight") -> dict[str, Place]:
    """`key` of a module -> the place of its weight, or its bias.

    The UNet's modules are there by diffusers' names and by LDM's, which differ in how they begin.
    """
    found = {}
    for place, part, theirs, ours in modules(sd, ending):
        found |= {key(part, theirs): place} | ({key(part, ours): place} if part == "unet" else {})
    return found


def key(part: str, path: str) -> str:
    """A module's name without dots, as sd-scripts writes it: its own has the same letters in every tool."""
    return f"{part}_{path}".replace(".", "_").replace("_text_model_", "_", 1)


def find_place(found: Mapping[str, Place], name: str, architecture: str) -> Place:
    """Of a module by its key; diffusers' old files say `to_out` for `to_out.0`. ValueError where there is none."""
    if place := found.get(name) or found.get(f"{name}_0"):
        return place
    raise UserError(f"changes {name[:100]!r}, which {architecture} does not have")


def find_architecture(metadata: Mapping[str, str], said: Mapping[str, Any], width: int | None) -> str:
    """The base model that a file is for: what a user says, else what the file says, else the first that fits.

    Args:
        metadata: of the file.
        said: by the user, where `architecture` is one.
        width: of the text encodings that it is for; None where it does not say.

    Raises:
        ValueError: none of the backbones; or one whose text has another width.
    """
    widths = {name: unet["context_dim"] for name, unet in recognise.unets().items()}
    named = said.get("architecture") or metadata.get("base_architecture")
    version, spec = metadata.get("ss_base_model_version"), metadata.get("modelspec.architecture", "").split("/")[0]
    named = named or VERSIONS.get(version or "", version) or SPECS.get(spec, spec)
    for name, own in widths.items():
        if name == named and width in (None, own) or not named and width == own:
            return name
    base = f"for {shown(named)}" if named else "for a base model that it does not name"
    text = "" if width is None else f", with text {width} wide"
    raise UserError(f"it is {base}{text}: --architecture names one of {', '.join(widths)} that fits")


def history(
    file: TensorFile | Folder, said: Mapping[str, Any], token: str = "", placeholder: str = ""
) -> dict[str, Any]:
    """What a concept says beside its tensors: words, base model and training, as far as anything says so.

    Words come from the user, the file's own token, its metadata, the most frequent tag of its captions, or its name.
    A placeholder stands for learned vectors in prompts.
    """
    metadata, path, token = file.metadata, Path(file.path), re.sub("[<>]", "", token)
    noun = said.get("noun") or token or metadata.get("modelspec.trigger_phrase", "") or _tag(metadata)
    noun = " ".join(noun.split()) if noun.isprintable() and len(noun) <= WORD else ""
    superclass = said.get("superclass") or metadata.get("superclass") or noun
    if not superclass:
        superclass = noun = path.stem.replace("_", " ")[:WORD]
        logger.warning("warning: %s names no trigger word: {} reads as %r; --noun names another", path, noun)
    digest = metadata.get("base_sha256") or metadata.get("ss_new_sd_model_hash", "")
    numbers = {name: metadata.get(name) or metadata.get(f"ss_{name}") or "" for name in ("steps", "seed")}
    rate = metadata.get("learning_rate") or metadata.get("ss_learning_rate") or ""
    date = metadata.get("date") or metadata.get("modelspec.date") or ""
    return {
        "superclass": superclass,
        "noun": said.get("noun") or placeholder.strip() or noun or superclass,
        "templates": tuple(said.get("templates") or _templates(metadata)),
        "base_hash": digest if re.fullmatch("[0-9a-f]{64}", digest) else None,
        "base_use_ema": metadata.get("base_use_ema") == "true",
        "base_parts": as_mapping(metadata.get("base_parts")),
        "attention": "own",
        **{name: int(text) for name, text in numbers.items() if re.fullmatch("[0-9]{1,19}", text)},
        **({"learning_rate": float(rate)} if re.fullmatch(r"[0-9.]{1,12}(e-[0-9]{1,2})?", rate) else {}),
        **({"date": date} if re.fullmatch(r"[0-9T:+.Z -]{4,40}", date) else {}),
    }


def as_mapping(text: str | None) -> dict[str, Any]:
    """A JSON mapping of a file's metadata; {} where it is none."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _templates(metadata: Mapping[str, str]) -> list[str]:
    said = as_mapping(f'{{"templates": {metadata.get("templates", "[]")}}}').get("templates")
    return said if isinstance(said, list) and said and all(isinstance(t, str) for t in said) else ["a photo of a {}"]


def _tag(metadata: Mapping[str, str]) -> str:
    """The most frequent tag of the captions; without any, the words of a folder such as `10_sks dog`."""
    folders = as_mapping(metadata.get("ss_tag_frequency"))
    counts: dict[str, int] = {}
    for tags in folders.values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            counts[tag.strip()] = counts.get(tag.strip(), 0) + (count if isinstance(count, int) else 0)
    if counts:
        return max(counts, key=counts.__getitem__)
    return next((re.sub(r"^\d+_", "", folder) for folder in folders), "")
