"""The base model that a command's flags and its concept files name."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from ldm.util.config import find, load_config

if TYPE_CHECKING:
    import torch

    from infusion.concepts.concept import Concept
    from ldm.pipeline import StableDiffusion

logger = logging.getLogger(__name__)


def load_base(
    flags: argparse.Namespace, config: Path, concepts: "Sequence[Concept]", device: "torch.device"
) -> "StableDiffusion":
    """The base model of a backbone's config with the weights that `--ckpt`, `--part` and `--use_ema` name.

    Without `--use_ema` or `--no-use_ema` the UNet's averaged weights are taken where all concepts were trained on
    them and the file has some; a line says where that would be wanted and is not done.
    """
    from ldm.pipeline import StableDiffusion

    weights = find(flags.ckpt) if flags.ckpt else None
    use_ema = flags.use_ema
    if use_ema is None and any(concept.base_use_ema for concept in concepts) and "unet" not in (flags.part or {}):
        file = weights or usual_weights(config)
        use_ema = _takes_averages(file, concepts) if file is not None and file.exists() else None
    return StableDiffusion.from_checkpoint(config, weights, device=device, use_ema=use_ema, parts=flags.part)


def usual_weights(config: Path) -> Path | None:
    """The file, or diffusers folder, that a backbone's config takes its weights from; None where it names none."""
    name = OmegaConf.select(load_config(config), "sd.params.checkpoint")
    return None if name is None else find(name)


def _takes_averages(weights: Path, concepts: "Sequence[Concept]") -> bool:
    """Whether to take the averaged weights of a file, when at least one of the concepts was trained on averages."""
    from ldm.weights.checkpoint import has_averages

    if not all(concept.base_use_ema for concept in concepts):
        logger.warning("warning: some of the concepts were trained on averaged weights: --use_ema takes them for all")
        return False
    if not has_averages(weights):
        logger.warning("warning: the concept was trained on averaged weights, and %s has none", weights)
        return False
    return True
