"""What main.py does for every training: reads its config and makes its Trainer."""

import json
import logging
import warnings
from argparse import Namespace
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.training.callbacks import StepBar
from ldm.util.cli import UserError
from ldm.util.config import ConfigError, check_params, instantiate, load_config, override, refuse_unused, resolve
from ldm.util.run import CONFIG, Finite, Log, ResumeState, StateFile, folder_of

FIXED = ("model", "data", "seed", "use_ema", "weights")  # in a resumed run
TRAINER = {"accelerator": "auto", "devices": 1, "enable_model_summary": False, "log_every_n_steps": 10}
NOISE = (  # warnings of Lightning's about what is meant to be so
    "many workers",
    "LeafSpec",
    "smaller than the logging",
    "directory .* not empty",
    "is not resumable",
    "in eval mode at the start",
)


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
    """The resolved config: files, defaults, then overrides and flags; checked as far as it can be without building."""
    files = flags.base
    if flags.resume:
        files = [folder_of(flags.resume) / CONFIG]
        if not files[0].is_file():
            raise UserError(f"--resume: {flags.resume} is not a run: it has no {CONFIG}; start one by --base")
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
        override(config, word)
    if flags.seed is not None:
        config.seed = flags.seed
    for key in [str(key) for key in config if OmegaConf.is_missing(config, key)]:
        if not flags.summary:
            raise ConfigError(f"{key}: not set yet; set it in the config or by {key}=…")
        config[key] = "object"  # the size depends on no word and no folder
    config = resolve(config)
    nodes = {key: value for key, value in OmegaConf.to_container(config).items() if key in NODES}
    check_params(Training, nodes, "")
    check_params(pl.Trainer, nodes["trainer"], "trainer")
    if nodes["trainer"].get("accumulate_grad_batches", 1) < 1:  # where Lightning divides by it
        raise ConfigError("trainer.accumulate_grad_batches: must be at least 1")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed: must be from 0 to 2**32 - 1, not {config.seed}")
    return config


def make_trainer(
    folder: Path,
    config: DictConfig,
    step: int = 0,
    gpus: str | None = None,
    devices: int | str | None = None,
    num_nodes: int | None = None,
    strategy: str | None = None,
) -> pl.Trainer:
    """A Trainer of the config's parameters, then the flags', that keeps everything in the run folder.

    Args:
        step: that the run is resumed at, or 0.
        gpus: indices with commas between them.
        devices: how many, or "auto".

    Raises:
        UserError: Lightning refuses the parameters, or they are of devices that are not there.
    """
    params = TRAINER | OmegaConf.to_container(config.trainer)
    given = {"devices": devices, "num_nodes": num_nodes, "strategy": strategy}
    params |= {name: value for name, value in given.items() if value is not None}
    if gpus is not None:
        params |= {"accelerator": "gpu", "devices": f"{gpus},"}
    nodes = OmegaConf.to_container(config.callbacks) or []
    callbacks = [node for node in (nodes.values() if isinstance(nodes, dict) else nodes) if node is not None]
    params = instantiate(params, "trainer")
    # what was logged after the state is purged
    params.setdefault("logger", Log(folder, name="", version="tensorboard", purge_step=step or None))
    bars = [StepBar()] if params.get("enable_progress_bar", True) else []
    states = ResumeState(config.save_every, config.keep)
    params["callbacks"] = [*instantiate(callbacks, "callbacks"), *bars, Finite(config.non_finite), states]
    params["plugins"] = [*params.get("plugins", ()), StateFile()]
    try:
        return pl.Trainer(default_root_dir=folder, enable_checkpointing=False, **params)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"{'--gpus' if gpus else 'trainer'}: {error}") from error


def summarise(model: pl.LightningModule) -> str:
    """JSON about what a module trains: numbers, layers that own some, bytes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    owners = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    counts = {"trainable_parameters": sum(p.numel() for p in trained), "layers": len(owners)}
    return json.dumps(counts | {"bytes": sum(p.numel() * p.element_size() for p in trained)}, indent=2)


def quiet() -> None:
    """Shows our own log, and what Lightning warns of beyond `NOISE`."""
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=f".*{noise}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for library in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
