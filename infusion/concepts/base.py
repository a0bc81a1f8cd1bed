"""The base model that a command's flags and its concept files name.

What only looks at files needs nothing that is slow to import, so that a missing one is reported at once.
"""

import argparse
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from ldm.util.cli import UserError, naming
from ldm.util.config import backbones, find, load_config
from ldm.util.defaults import PREFIXES

if TYPE_CHECKING:
    import torch

    from infusion.concepts.concept import Concept
    from ldm.pipeline import StableDiffusion

HEADER = 2**20  # bytes of a concept file's header, at most
logger = logging.getLogger(__name__)


def architecture_of(path: Path) -> str | None:
    """The architecture that a concept file names; None where `Concept.load` would refuse the file."""
    if not path.is_file():  # a pipe has no end
        return None
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            name = json.loads(file.read(min(size, HEADER)))["__metadata__"]["base_architecture"]
        return name if re.fullmatch(r"\w[\w .+-]{0,63}", name) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def check_concepts_there(names: Sequence[str]) -> None:
    """Raises UserError for a concept file, or run folder, that is not there."""
    for name in names:
        if not find(name).exists():
            raise UserError(f"{name}: there is no such concept file")


def check_there(flag: str, name: str | None, kind: str = "file") -> None:
    """Raises UserError, which names the flag, for a file or folder that a flag names and that is not there."""
    if name and not find(name).exists():
        raise UserError(f"--{flag}: there is no {kind} {name}")


def check_weights(flags: argparse.Namespace, config: Path) -> None:
    """Raises UserError for weights of the base model that are not there; the config's own count where no flag does."""
    check_there("ckpt", flags.ckpt)
    for name in (flags.part or {}).values():
        check_there("part", name)
    usual = usual_weights(config)
    if flags.ckpt or usual is None or usual.exists() or (flags.part or {}).keys() == PREFIXES.keys():
        return
    source = load_config(config).get("ckpt_source")
    hint = f"get it from {source}, or " if source else ""
    raise UserError(f"--ckpt: there is no file {usual}; {hint}name another checkpoint of {config.stem}")


def check_fit(flags: argparse.Namespace, config: Path, concepts: "Mapping[str, Concept]") -> None:
    """Before anything is loaded: the concepts are for the config's model, and so is the file of its weights.

    Args:
        concepts: by their files.

    Raises:
        UserError: they are not, as far as metadata, names and shapes of tensors tell; it names the file.
    """
    from ldm.weights.diffusers_layout import open_checkpoint
    from ldm.weights.recognise import recognise

    name = OmegaConf.select(load_config(config), "sd.params.name")
    for file, concept in concepts.items():
        with naming(file):
            concept.check_architecture(name)
    if flags.ckpt and name in backbones() and "unet" not in (flags.part or {}):
        with open_checkpoint(find(flags.ckpt)) as file:
            kind = recognise(file)
        if kind.architectures and name not in kind.architectures:
            raise UserError(f"--ckpt: {flags.ckpt} is {kind.says}, and the concepts are for {name}")


def load_base(
    flags: argparse.Namespace, config: Path, concepts: "Sequence[Concept]", device: "torch.device"
) -> "StableDiffusion":
    """The base model of a backbone's config with the weights that `--ckpt`, `--part` and `--use_ema` name.

    Without `--use_ema` or `--no-use_ema` the UNet's averaged weights are taken where all concepts were trained on
    them and the file has some; a line says where that would be wanted and is not done.
    """
    from ldm.pipeline import StableDiffusion
    from ldm.weights.checkpoint import has_averages

    weights, use_ema = find(flags.ckpt) if flags.ckpt else None, flags.use_ema
    averaged = [concept.base_use_ema for concept in concepts]
    file = weights or usual_weights(config)
    if use_ema is None and any(averaged) and "unet" not in (flags.part or {}) and file is not None and file.exists():
        use_ema = all(averaged) and has_averages(file)
        if not all(averaged):
            logger.warning(
                "warning: some of the concepts were trained on averaged weights: --use_ema takes them for all"
            )
        elif not use_ema:
            logger.warning("warning: the concept was trained on averaged weights, and %s has none", file)
    return StableDiffusion.from_checkpoint(config, weights, device=device, use_ema=use_ema, parts=flags.part)


def usual_weights(config: Path) -> Path | None:
    """The file, or diffusers folder, that a backbone's config takes its weights from; None where it names none."""
    name = OmegaConf.select(load_config(config), "sd.params.checkpoint", throw_on_resolution_failure=False)
    return find(name) if isinstance(name, str) else None
