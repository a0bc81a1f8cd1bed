"""Training: flags -> config -> objects -> Trainer.fit."""

import atexit
import logging
import shlex
import sys
from argparse import Namespace
from pathlib import Path

from omegaconf import OmegaConf

from ldm.training.config import Training, check_inputs, check_nodes, read_config
from ldm.util.cli import Parser, count, report
from ldm.util.config import instantiate
from ldm.util.folders import folder_of, requeued

DEVICES = ("gpus", "devices", "num_nodes", "strategy")  # flags that a resumed run is given anew


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
    add("--devices", help="number of devices, or auto", type=lambda text: text if text == "auto" else count(text))
    add("--num_nodes", help="number of machines", type=count, default=None)
    add("--strategy", help="Lightning's strategy, such as ddp", default=None)
    add("-s", "--seed", type=int, help=f"None: the config's `seed`, else {Training.seed}", default=None)
    add("-r", "--resume", metavar="RUN", help="run folder, or a state in it, to resume", default=None)
    add("--summary", action="store_true", help="print the model's size as JSON; needs no weights and no images")
    flags, rest = parser.parse_known_args(arguments)
    flags.overrides = [word for word in flags.base + rest if "=" in word and not Path(word).is_file()]
    flags.base = [word for word in flags.base if word not in flags.overrides]
    if requeued(flags.logdir):
        flags.resume, flags.base, flags.overrides = flags.logdir, [], []
        flags.logdir = flags.name = flags.seed = None
    for word, value in zip(rest, [*rest, "-"][1:], strict=True):
        if word.startswith("-") or "=" not in word:
            key, sign, own = word.lstrip("-").partition("=")
            value = own if sign else "…" if value.startswith("-") or "=" in value else value
            hint = f"; a key of the config is set by {key}={value}" if word.startswith("--") and key else ""
            parser.error(f"unknown argument `{word}`{hint}")
    if bool(flags.base) == bool(flags.resume):
        parser.error("--base FILE starts a run, --resume RUN resumes one: give one of the two")
    for name in ("name", "logdir", "seed"):
        if flags.resume and getattr(flags, name) is not None:
            parser.error(f"--{name}: a resumed run keeps its own")
    if flags.name and Path(flags.name).name != flags.name:
        parser.error(f"--name: {flags.name} leads to another folder: give a plain name, or a folder by --logdir")
    if flags.gpus and flags.devices:
        parser.error("--gpus and --devices: give one of the two")
    return flags


def resume_command(flags: Namespace, folder: Path) -> str:
    """The command that resumes a run, on the same devices."""
    devices = [f"--{name}={getattr(flags, name)}" for name in DEVICES if getattr(flags, name)]
    return shlex.join(["python", sys.argv[0], "--resume", str(folder), "-t", *devices, *flags.overrides])


@report
def main() -> None:
    flags = parse()
    config = read_config(flags)
    if not flags.summary:
        check_inputs(config)
    check_nodes(config)

    import pytorch_lightning as pl  # these take seconds, and mistakes are reported at once
    import torch

    from ldm.training.setup import build_model, make_trainer, quiet, summarise
    from ldm.util import run
    from ldm.util.dist import leave

    quiet()
    if flags.summary:
        print(summarise(build_model(config, meta=True)))
        return
    atexit.register(leave)
    name = flags.name or (Path(flags.base[-1]).stem if flags.base else "")
    folder = folder_of(flags.resume) if flags.resume else run.new_folder(flags.logdir, flags.basedir, name)
    state, step = run.resume_state(flags.resume) if flags.resume else (None, 0)
    if flags.train and 0 < config.trainer.get("max_steps", -1) <= step:
        more = f"{resume_command(flags, folder)} trainer.max_steps={2 * step}"
        logging.info("%s: finished at step %d; it goes on by, for example: %s", folder, step, more)
        return
    pl.seed_everything(config.seed, workers=True, verbose=False)
    devices = {name: getattr(flags, name) for name in DEVICES}
    trainer = make_trainer(folder, config, step, **devices)
    data = instantiate(config.data, "data")
    model = build_model(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logging.info("%s: %s trainable parameters, %s", type(model).__name__, f"{trained:,}", folder)
    if not flags.train:
        return
    torch.manual_seed(config.seed + step)  # a resumed run does not draw the numbers of the first steps again
    try:
        with run.working_in(folder, OmegaConf.to_yaml(config)):
            for log in trainer.loggers:
                log.log_hyperparams(OmegaConf.to_container(config))
            trainer.fit(model, data, ckpt_path=state, weights_only=True)
    except run.Stopped:
        if trainer.is_global_zero:
            logging.info("stopped; resume by: %s", resume_command(flags, folder))


if __name__ == "__main__":
    main()
