"""Builds what a config describes: the model with its weights, and its Trainer."""

import json
import logging
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.pipeline import StableDiffusion
from ldm.training.callbacks import StepBar
from ldm.training.config import Training, weight_files
from ldm.util.cli import UserError, check_range
from ldm.util.config import ConfigError, check_params, instantiate
from ldm.util.run import Finite, Log, ResumeState, StateFile

TRAINER = {  # where a config says nothing
    **{"accelerator": "auto", "devices": 1, "accumulate_grad_batches": 1},
    **{"enable_model_summary": False, "log_every_n_steps": 10},
}
NOISE = (  # warnings of Lightning's about what is meant to be so
    "many workers",
    "LeafSpec",
    "smaller than the logging",
    "directory .* not empty",
    "is not resumable",
    "in eval mode at the start",
)


def build_model(config: DictConfig, meta: bool = False) -> pl.LightningModule:
    """The model; its `sd` gets its weights before the model changes anything in it. With `meta`, nothing has values."""
    node = (config.model.get("params") or {}).get("sd")
    if node is None and (config.get("ckpt") or config.get("parts")):
        raise ConfigError("ckpt: names weights, and model.params has no `sd` to load them into")
    with torch.device("meta" if meta or config.get("ckpt") else "cpu"):  # a checkpoint brings the values of all tensors
        if node is None:
            return instantiate(config.model, "model")
        sd = instantiate(node, "model.params.sd")
    sd.config = OmegaConf.to_container(node)
    if not meta:
        load_weights(sd, config)
    sd.cast(getattr(torch, config.get("weights", Training.weights)))
    return instantiate(config.model, "model", given={"sd": sd})


def load_weights(sd: StableDiffusion, config: DictConfig) -> None:
    """Loads the checkpoint, then the components that have files of their own."""
    for key, file in weight_files(config).items():
        if key == "ckpt":
            sd.load(file, config.use_ema)
        else:
            sd.load_part(key.removeprefix("parts."), file)


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
    params = OmegaConf.to_container(config.trainer)
    check_params(pl.Trainer, params, "trainer")
    params = TRAINER | params
    check_range("trainer.accumulate_grad_batches", params["accumulate_grad_batches"], 1)  # Lightning divides by it
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
