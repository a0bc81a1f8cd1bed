"""The config of a training: what it may say, and whether what it names is there.

Nothing here is slow to import, so that a mistake is reported at once.
"""

from argparse import Namespace
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from ldm.util.cli import UserError, check_range, suggestion
from ldm.util.config import ConfigError, check_params, find, load_config, override, refuse_unused, resolve, texts
from ldm.util.defaults import POCKET, PREFIXES
from ldm.util.folders import CONFIG, folder_of

FIXED = ("model", "data", "seed", "use_ema", "weights")  # in a resumed run
INPUTS = {  # where a config names a file or folder to read -> what it is
    "data_root": "folder",
    "covariance.params.path": "covariance file",
    "params.contextualizer": "contextualizer (docs/regularisers.md)",
    "start_from": "concept file",
    "tools.params.clip": "folder",
    "tools.params.clipseg": "folder",
}


@dataclass
class Training:
    """What a config says of a training; every other key is there to be referred to.

    Attributes:
        model: node of a LightningModule.
        data: node of a LightningDataModule.
        trainer: parameters of `pytorch_lightning.Trainer`.
        callbacks: nodes, as a list or by name; null under a name drops one.
        ckpt: file that the model's `sd` starts from; `ckpt_source` says where to get it.
        parts: components of `sd` (unet, vae, text) that come from files of their own.
        use_ema: take the averaged weights of the UNet in `ckpt`.
        weights: type of the frozen UNet and text encoder.
        save_every: optimiser steps between two resume states; `keep` is how many of them there are.
        non_finite: what to do when a loss or gradient is NaN or infinite: stop training, or skip the step.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] | list[Any] | None = None
    ckpt: str | None = None
    ckpt_source: str | None = None
    parts: dict[str, str] | None = None
    use_ema: bool = False
    weights: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 23
    save_every: int = 500
    keep: int = 1
    non_finite: Literal["stop", "skip"] = "stop"


NODES = tuple(node.name for node in fields(Training))
DEFAULTS = {"trainer": {}, "callbacks": {}, "parts": {}} | {
    name: getattr(Training, name) for name in NODES if getattr(Training, name, None) is not None
}


def read_config(flags: Namespace) -> DictConfig:
    """The resolved config: files, defaults, then overrides and flags."""
    files = flags.base
    if flags.resume:
        files = [folder_of(flags.resume) / CONFIG]
        if not files[0].is_file():
            advice = "start one by --base"
            if files[0].parent.is_file():
                advice = "a new run starts from a concept file by --base FILE start_from=FILE"
            raise UserError(f"--resume: {flags.resume} is not a run: it has no {CONFIG}; {advice}")
        for word in flags.overrides:
            node = word.split("=")[0].split(".")[0]
            if node in FIXED or node not in NODES:
                raise UserError(f"override `{word}`: a resumed run keeps its own model, data and seed")
    config = load_config(files, defaults=DEFAULTS)
    for node in ("model", "data"):
        if node not in config:
            raise ConfigError(f"{', '.join(map(str, files))}: the config has no `{node}`")
    if not flags.resume:
        refuse_unused(config, NODES)  # before an override drops what refers to a key
    for word in flags.overrides:
        override(config, word, Training)
    if flags.seed is not None:
        config.seed = flags.seed
    for key in [str(key) for key in config if OmegaConf.is_missing(config, key)]:
        if not flags.summary:
            raise ConfigError(f"{key}: not set yet; set it in the config or by {key}=…")
        config[key] = "object"  # the size depends on no word and no folder
    return resolve(config)


def check_nodes(config: DictConfig) -> None:
    """Raises ConfigError for what no training can be built of: unknown classes and parameters, values of another type.

    It imports the classes that the config names.
    """
    check_params(Training, {key: value for key, value in OmegaConf.to_container(config).items() if key in NODES}, "")
    check_range("seed", config.seed, 0, 2**32 - 1)


def weight_files(config: DictConfig) -> dict[str, Path]:
    """Config key (`ckpt`, `parts.vae`, …) -> file of weights, here or in the repository; UserError if there is none."""
    parts = OmegaConf.to_container(config.parts) if isinstance(config.get("parts"), DictConfig) else {}
    if unknown := sorted(parts.keys() - PREFIXES.keys()):
        raise ConfigError(f"parts.{unknown[0]}: unknown component{suggestion(unknown[0], list(PREFIXES))}")
    if config.get("ckpt") is None and config.use_ema:
        raise ConfigError("use_ema: there is no `ckpt` whose averaged weights it could take")
    names = {"ckpt": config.get("ckpt")} | {f"parts.{component}": name for component, name in parts.items()}
    found = {key: find(name) for key, name in names.items() if isinstance(name, str)}
    for key, file in found.items():
        if not file.exists():
            source = f"get it from {config.ckpt_source} or " if key == "ckpt" and config.get("ckpt_source") else ""
            raise UserError(f"{key}: there is no file {names[key]}; {source}name another by {key}=FILE")
    return found


def check_inputs(config: DictConfig) -> None:
    """Raises UserError for weights, photos, a covariance or a network that is not there."""
    weight_files(config)
    nodes = OmegaConf.to_container(config)
    for key, name in texts({node: nodes[node] for node in ("data", "model", "callbacks")}):
        kind = next((kind for end, kind in INPUTS.items() if key.endswith(f".{end}")), None)
        if kind and name != POCKET and not find(name).exists():
            raise UserError(f"{key}: there is no {kind} {name}")
