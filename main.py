"""Training: flags -> config -> objects -> Trainer.fit.

A config has the nodes `model` (a LightningModule), `data` (a LightningDataModule), `trainer` (the parameters of
`pytorch_lightning.Trainer`) and, optionally, `callbacks` (a list of nodes, or a mapping of names to nodes where null
drops one). `ckpt` is the checkpoint that the model's `sd` starts from, `ckpt_source` where to get it; `parts` maps
components of `sd` (unet, vae, text) to files that hold one each. `use_ema: true` takes the averaged weights of the UNet
in `ckpt`. `weights` is the type of the frozen UNet and text encoder: float32, bfloat16 or float16. `save_every` is the
number of optimiser steps between two resume states, `models/last.ckpt`; `keep` is how many of the last ones there are.
`non_finite` is what a loss or gradient does that is not: stop, or skip the step.
"""

import atexit
import json
import logging
import os
import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.util.config import (
    ConfigError,
    check,
    check_params,
    find,
    instantiate,
    load_config,
    override,
    refuse_unused,
    resolve,
)
from ldm.util.defaults import POCKET, PREFIXES
from ldm.util.errors import Parser, UserError, report, suggestion
from ldm.util.run import (
    Finite,
    Log,
    ResumeState,
    StateFile,
    Stopped,
    folder_of,
    is_run,
    new_folder,
    resume_state,
    working_in,
)

if TYPE_CHECKING:  # what takes seconds to import is imported where it works, after the flags have been read
    import pytorch_lightning as pl

    from ldm.pipeline import StableDiffusion

DEFAULTS = {"trainer": {}, "callbacks": {}, "parts": {}, "use_ema": False, "weights": "float32", "seed": 23,
            "save_every": 500, "keep": 1, "non_finite": "stop"}  # fmt: skip
LONG = 10**9  # steps of a training, at most
INPUTS = {  # where a config names a file or folder to read -> what it is
    "data_root": "folder",
    "covariance.params.path": "covariance file",
    "tools.params.clip": "folder",
    "tools.params.clipseg": "folder",
}
WEIGHTS = ("float32", "bfloat16", "float16")
NODES = ("model", "data", "ckpt", "ckpt_source", *DEFAULTS)
FIXED = ("model", "data", "seed", "use_ema", "weights")  # in a resumed run
NOISE = (  # warnings of Lightning's about what is meant to be so
    *("many workers", "LeafSpec", "smaller than the logging", "directory .* not empty", "is not resumable"),
    "in eval mode at the start",
)
TRAINER = {"accelerator": "auto", "devices": 1, "enable_model_summary": False, "log_every_n_steps": 10}


def parse(arguments: list[str] | None = None) -> Namespace:
    usage = "main.py --base A.yaml [B.yaml ...] [flags] [key=value ...]"
    parser = Parser(description="Trains what a config describes.", usage=usage)
    add = parser.add_argument
    add("-b", "--base", nargs="+", metavar="FILE", help="configs, merged from left to right", default=[])
    add("-t", "--train", action="store_true", help="train; without it everything is built, reported and left")
    add("-n", "--name", help="name of the run; None: the last config's", default=None)
    add("--basedir", metavar="DIR", help="where run folders <time>_<name> go", default="logs")
    add("--logdir", metavar="DIR", help="exactly this run folder", default=None)
    add("--gpus", metavar="LIST", help="indices of the GPUs to use, such as 0,1", default=None)
    add("--devices", help="number of devices, or auto", default=None)
    add("--num_nodes", type=int, help="number of machines", default=None)
    add("--strategy", help="Lightning's strategy, such as ddp", default=None)
    add("-s", "--seed", type=int, help=f"None: the config's `seed`, else {DEFAULTS['seed']}", default=None)
    add("-r", "--resume", metavar="RUN", help="run folder, or a state in it, to go on with", default=None)
    add("--summary", action="store_true", help="print the model's size as JSON; needs no weights and no images")
    flags, rest = parser.parse_known_args(arguments)
    flags.overrides = [word for word in flags.base + rest if "=" in word and not Path(word).is_file()]
    flags.base = [word for word in flags.base if word not in flags.overrides]
    if requeued(flags):
        flags.resume, flags.base, flags.overrides = flags.logdir, [], []
        flags.logdir = flags.name = flags.seed = None
    for word in rest:
        if word.startswith("-") or "=" not in word:
            parser.error(f"unknown argument `{word}`")
    if bool(flags.base) == bool(flags.resume):
        parser.error("--base FILE starts a run, --resume RUN goes on with one: give one of the two")
    for name in ("name", "logdir", "seed"):
        if flags.resume and getattr(flags, name) is not None:
            parser.error(f"--{name}: a resumed run keeps its own")
    if flags.name and Path(flags.name).name != flags.name:
        parser.error(f"--name: {flags.name} leads to another folder: give a plain name, or a folder by --logdir")
    if flags.gpus and flags.devices:
        parser.error("--gpus and --devices: give one of the two")
    return flags


def requeued(flags: Namespace) -> bool:
    """Whether a cluster has started the same command once more, for a run that has begun (SLURM)."""
    again = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    return again and bool(flags.logdir) and is_run(flags.logdir)


def read_config(flags: Namespace) -> DictConfig:
    """The resolved config: files, defaults, then overrides and flags."""
    if flags.resume:
        if not is_run(folder_of(flags.resume)):
            raise UserError(f"--resume: {flags.resume} is no run: it has no config.yaml; start it by --base")
        for word in flags.overrides:
            node = word.split("=")[0].split(".")[0]
            if node in FIXED or node not in NODES:
                raise UserError(f"override `{word}`: a resumed run keeps its own model, data and seed")
    files = [folder_of(flags.resume) / "config.yaml"] if flags.resume else flags.base
    config = load_config(files, defaults=DEFAULTS)
    if not flags.resume:
        refuse_unused(config, NODES)  # before an override drops what refers to a key
    for word in flags.overrides:
        override(config, word)
    if flags.seed is not None:
        config.seed = flags.seed
    for node in ("model", "data"):
        if node not in config:
            raise ConfigError(f"{', '.join(map(str, files))}: the config has no `{node}`")
    if not isinstance(config.use_ema, bool):
        raise ConfigError(f"use_ema: true or false is wanted, not {config.use_ema!r}")
    if config.weights not in WEIGHTS:
        raise ConfigError(f"weights: one of {', '.join(WEIGHTS)} is wanted, not {config.weights!r}")
    for key in ("seed", "save_every", "keep"):
        if not isinstance(config[key], int) or isinstance(config[key], bool):
            raise ConfigError(f"{key}: an integer is wanted, not {config[key]!r}")
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"seed: must be from 0 to 2**32 - 1, not {config.seed}")
    for key in ("save_every", "keep"):
        if not 1 <= config[key] <= LONG:
            raise ConfigError(f"{key}: must be from 1 to {LONG:,}, not {config[key]}")
    wanted = {"trainer": DictConfig, "callbacks": DictConfig | ListConfig | None, "parts": DictConfig | None}
    for key, kind in wanted.items():
        if not isinstance(config[key], kind):
            raise ConfigError(f"{key}: a mapping of names to values is wanted, not {config[key]!r}")
    for key in [str(key) for key in config if OmegaConf.is_missing(config, key)]:
        if not flags.summary:
            raise ConfigError(f"{key}: not set yet; set it in the config or by {key}=…")
        config[key] = "object"  # the size depends on no word and no folder
    return resolve(config)


def trainer_params(flags: Namespace, config: DictConfig) -> dict:
    """Parameters of the Trainer: ours, then the config's, then the flags'."""
    params = TRAINER | OmegaConf.to_container(config.trainer)
    given = {name: getattr(flags, name) for name in ("num_nodes", "strategy") if getattr(flags, name) is not None}
    if flags.gpus:
        import torch

        try:
            indices = [int(index) for index in flags.gpus.split(",") if index]
        except ValueError as error:
            raise UserError(f"--gpus: `{flags.gpus}` is not a list of indices such as 0,1") from error
        count = torch.cuda.device_count()
        if not indices or min(indices) < 0 or max(indices) >= count:
            raise UserError(f"--gpus: `{flags.gpus}` was asked for, and this machine has {count} CUDA devices")
        given |= {"accelerator": "gpu", "devices": indices}
    leasts = {"max_steps": -1, "max_epochs": -1, "accumulate_grad_batches": 1, "gradient_clip_val": 0}
    for name, least in leasts.items():
        value = params.get(name)
        if isinstance(value, int | float) and not least <= value <= LONG:
            raise ConfigError(f"trainer.{name}: must be from {least} to {LONG:,}, not {value}")
    if flags.devices:
        given["devices"] = int(flags.devices) if flags.devices.isdigit() else flags.devices
    return params | given


def callback_nodes(config: DictConfig) -> list:
    nodes = OmegaConf.to_container(config.callbacks) or []
    return [node for node in (nodes.values() if isinstance(nodes, dict) else nodes) if node is not None]


def check_config(config: DictConfig, params: dict) -> None:
    """Every mistake that can be seen without building anything."""
    import pytorch_lightning as pl

    check(config.model, "model")
    check(config.data, "data")
    check(callback_nodes(config), "callbacks")
    check_params(pl.Trainer, params, "trainer")


def summarise(config: DictConfig) -> str:
    model = build_model(config, {}, meta=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    owners = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    counts = {"trainable_parameters": sum(p.numel() for p in trained), "layers": len(owners)}
    return json.dumps(counts | {"bytes": sum(p.numel() * p.element_size() for p in trained)}, indent=2)


def weight_files(config: DictConfig) -> dict[str, Path]:
    """Config key (`ckpt`, `parts.vae`, …) -> file of weights, here or in the repository; UserError if there is none."""
    parts = OmegaConf.to_container(config.parts) or {}
    for component in parts:
        if component not in PREFIXES:
            raise ConfigError(f"parts.{component}: unknown component{suggestion(component, list(PREFIXES))}")
    if config.use_ema and config.get("ckpt") is None:
        raise ConfigError("use_ema: there is no `ckpt` whose averaged weights it could take")
    found, names = {}, {"ckpt": config.get("ckpt")} | {f"parts.{component}": name for component, name in parts.items()}
    for key, name in names.items():
        if name is not None:
            if not isinstance(name, str):
                raise ConfigError(f"{key}: the name of a file is wanted, not {name!r}")
            found[key] = find(name)
            if not (found[key].exists() if key == "ckpt" else found[key].is_file()):  # a diffusers folder is one, too
                source = config.get("ckpt_source") if key == "ckpt" else None
                source = f"get it from {source} or " if source else ""
                raise UserError(f"{key}: there is no file {name}; {source}name another by {key}=FILE")
    return found


def check_inputs(config: DictConfig) -> None:
    """Raises UserError for photos, a covariance or a network that is not there."""
    nodes = OmegaConf.to_container(config)
    for key, name in words_of({node: nodes[node] for node in ("data", "model", "callbacks")}):
        kind = next((kind for end, kind in INPUTS.items() if key.endswith(f".{end}")), None)
        if kind and name != POCKET and not find(name).exists():
            raise UserError(f"{key}: there is no {kind} {name}")


def words_of(node: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested mappings and lists, with the key that leads to it, such as data.params.mask."""
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from words_of(child, f"{path}.{key}" if path else str(key))


def load_weights(sd: "StableDiffusion", files: dict[str, Path], use_ema: bool = False) -> None:
    """Loads the checkpoint, then the components that have files of their own."""
    for key, file in files.items():
        if key == "ckpt":
            sd.load(file, use_ema)
        else:
            sd.load_part(key.removeprefix("parts."), file)


def build_model(config: DictConfig, files: dict[str, Path], meta: bool = False) -> "pl.LightningModule":
    """The model; its `sd` gets its weights before the model changes anything in it. With `meta`, nothing has values."""
    import torch

    device = torch.device("meta" if meta or "ckpt" in files else "cpu")  # a checkpoint brings the values of all tensors
    if "sd" in (config.model.get("params") or {}):
        with device:
            sd = instantiate(config.model.params.sd, "model.params.sd")
        sd.config = OmegaConf.to_container(config.model.params.sd)
        load_weights(sd, files, config.get("use_ema", False))
        sd.cast(getattr(torch, config.get("weights", "float32")))
        return instantiate(config.model, "model", given={"sd": sd})
    if files:
        raise ConfigError(f"{next(iter(files))}: names weights, and model.params has no `sd` to load them into")
    with device:
        return instantiate(config.model, "model")


def make_trainer(folder: Path, config: DictConfig, params: dict, step: int = 0) -> "pl.Trainer":
    """A Trainer that keeps everything in the run folder; one that goes on does so at a step."""
    import pytorch_lightning as pl
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from ldm.training.callbacks import StepBar

    params = instantiate(params, "trainer")
    bars = [StepBar()] if params.get("enable_progress_bar", True) else []
    purge = {"purge_step": step} if step else {}  # of what was logged after the state
    params.setdefault("logger", Log(folder, name="", version="tensorboard", **purge))
    params["callbacks"] = [
        *instantiate(callback_nodes(config), "callbacks"),
        *bars,
        Finite(config.non_finite),
        ResumeState(config.save_every, config.keep),
    ]
    params |= {"plugins": [*params.get("plugins", ()), StateFile()], "enable_checkpointing": False}
    try:
        return pl.Trainer(default_root_dir=folder, **params)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"trainer: {error}") from error


def resume_command(flags: Namespace, folder: Path) -> str:
    """The command that goes on with a run, on the same devices."""
    names = ("gpus", "devices", "num_nodes", "strategy")
    devices = [word for name in names if getattr(flags, name) for word in (f"--{name}", str(getattr(flags, name)))]
    return shlex.join(["python", sys.argv[0], "--resume", str(folder), "-t", *devices, *flags.overrides])


@report
def main() -> None:
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=f".*{noise}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    flags = parse()
    config = read_config(flags)
    if not flags.summary:  # which needs none of them
        files = weight_files(config)
        check_inputs(config)
    params = trainer_params(flags, config)
    check_config(config, params)
    if flags.summary:
        print(summarise(config))
        return
    import pytorch_lightning as pl
    import torch

    from ldm.util.dist import leave

    for library in ("pytorch_lightning", "lightning_fabric"):  # which set their own level when they are imported
        logging.getLogger(library).setLevel(logging.WARNING)
    atexit.register(leave)
    name = flags.name or (Path(flags.base[-1]).stem if flags.base else "")
    folder = folder_of(flags.resume) if flags.resume else new_folder(flags.logdir, flags.basedir, name)
    state, step = resume_state(flags.resume) if flags.resume else (None, 0)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = instantiate(config.data, "data")
    model = build_model(config, files)
    trainer = make_trainer(folder, config, params, step)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logging.info("%s: %s trainable parameters, %s", type(model).__name__, f"{trained:,}", folder)
    if not flags.train:
        return
    torch.manual_seed(config.seed + step)  # what draws from it does not draw the first steps' numbers again
    try:
        with working_in(folder, OmegaConf.to_yaml(config)):
            for log in trainer.loggers:
                log.log_hyperparams(OmegaConf.to_container(config))
            trainer.fit(model, data, ckpt_path=state, weights_only=True)
    except Stopped:
        if trainer.is_global_zero:
            logging.info("stopped; resume by: %s", resume_command(flags, folder))


if __name__ == "__main__":
    main()
