"""Estimates the inverse covariance C⁻¹ of text encodings, which weighs the gate, from captions.

python data/estimate_C_inv.py --caption captions.txt --save_path ckpt/C_inv_sd15.safetensors
python main.py --base configs/infusion_custom.yaml -t … covariance=ckpt/C_inv_sd15.safetensors
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from infusion.concepts.base import check_there, check_weights, usual_weights
from ldm.util.cli import Parser, UserError, components, count, find_device, number, report, written
from ldm.util.config import BACKBONES, ConfigError, find, instantiate, load_config

if TYPE_CHECKING:
    from ldm.models.text import ClipText, OpenClipText

TYPES = {"clip": "sd15", "openclip": "sd21"}  # text encoder -> its usual backbone

logger = logging.getLogger(__name__)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Estimates the inverse covariance of text encodings, which weighs the gate.")
    add = parser.add_argument
    add("--caption", required=True, metavar="FILE", help="captions, one a line, in UTF-8; Perfusion took 100,000")
    add("--save_path", type=written, required=True, metavar="FILE", help="file to write, ending in .safetensors")
    add("--type", choices=list(TYPES), help="text encoder: of SD 1.5 or of SD 2.1; None: clip, or what --config has")
    add("--config", metavar="FILE", help="backbone config; None: the one of --type")
    add("--ckpt", metavar="FILE", help="weights of the base model; None: the backbone's usual file")
    add("--part", metavar="text=FILE", type=components, help="file of the text encoder alone, as the base model's")
    add("--ridge", type=number, help="added to every eigenvalue of C, as a share of their mean", default=0.001)
    add("--batch_size", type=count, help="captions encoded at a time", default=64)
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    add("--overwrite", action="store_true", help="replace --save_path when it exists")
    flags = parser.parse_args(arguments)
    if flags.ridge < 0:
        parser.error(f"--ridge: must be at least 0, not {flags.ridge}")
    if other := sorted((flags.part or {}).keys() - {"text"}):
        parser.error(f"--part: of the base model the text encoder alone is read, not the {other[0]}: give text=FILE")
    if not flags.save_path.endswith(".safetensors"):
        parser.error(f"--save_path: {flags.save_path} must end in .safetensors")
    if Path(flags.save_path).exists() and not flags.overwrite:
        parser.error(f"--save_path: {flags.save_path} exists already; name another file, or give --overwrite")
    return flags


def read_config(flags: argparse.Namespace) -> tuple[Path, DictConfig]:
    """The backbone's file, and what it holds."""
    path = find(flags.config) if flags.config else BACKBONES / f"{TYPES[flags.type or 'clip']}.yaml"
    config = load_config(path)
    if OmegaConf.select(config, "sd.params.text") is None:
        raise ConfigError(f"--config: {flags.config} names no text encoder: it has no sd.params.text")
    return path, config


def find_weights(flags: argparse.Namespace, config: Path) -> Path:
    """The text encoder's weights: --part's, --ckpt's or the backbone's usual file."""
    if flags.part:
        check_there("part", flags.part["text"])
        return find(flags.part["text"])
    check_weights(flags, config)
    weights = find(flags.ckpt) if flags.ckpt else usual_weights(config)
    if weights is None:
        raise UserError("--ckpt: the config names no usual weights: name a file")
    return weights


def load_text_encoder(flags: argparse.Namespace, config: DictConfig, weights: Path) -> "ClipText | OpenClipText":
    import torch  # after the flags: it takes seconds

    from ldm.models.text import ClipText, OpenClipText
    from ldm.weights.checkpoint import load_into, load_part
    from ldm.weights.names import prefix_of

    with torch.device("meta"):
        text = instantiate(OmegaConf.to_container(config.sd.params.text, resolve=True), "sd.params.text")
    if flags.type and not isinstance(text, {"clip": ClipText, "openclip": OpenClipText}[flags.type]):
        raise UserError(f"--type: {flags.type} was asked for, and {flags.config} has a {type(text).__name__}")
    if flags.part:
        load_part("text", text, weights)
    else:
        load_into({prefix_of("text", text): text}, weights)
    return text.requires_grad_(False).eval().to(find_device(flags.device))


@report
def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    flags = parse(arguments)
    from infusion.covariance import InverseCovariance, estimate, invert, read_captions, save_inverse
    from ldm.weights.checkpoint import sha256

    if not Path(flags.caption).is_file():
        raise UserError(f"--caption: there is no file {flags.caption}")
    total = sum(1 for _ in read_captions(flags.caption))  # the whole file is read before anything slow
    if not total:
        raise UserError(f"--caption: {flags.caption} has no caption in it")
    path, config = read_config(flags)
    weights = find_weights(flags, path)
    text = load_text_encoder(flags, config, weights)
    covariance = estimate(text, tqdm(read_captions(flags.caption), "captions", total), flags.batch_size)
    inverse, before, after = invert(covariance.matrix, flags.ridge)
    logger.info("%s captions, %s word tokens", f"{covariance.captions:,}", f"{covariance.tokens:,}")
    if covariance.cut:
        counts, read = f"{covariance.cut:,} of {covariance.captions:,} captions", text.tokenizer.context_length - 2
        logger.warning("warning: %s have more than the %d tokens that are read: the rest is left out", counts, read)
    logger.info("condition number %.3g, with the ridge %.3g", before, after)
    facts = {"base_architecture": config.sd.params.name, "base_sha256": sha256(weights), "ridge": flags.ridge}
    facts |= {"captions": covariance.captions, "captions_cut": covariance.cut, "tokens": covariance.tokens}
    facts |= {"condition": after}
    save_inverse(flags.save_path, inverse, facts)
    logger.info("%s: %d × %d, %s", flags.save_path, *inverse.shape, InverseCovariance(flags.save_path).fingerprint[:12])


if __name__ == "__main__":
    main()
