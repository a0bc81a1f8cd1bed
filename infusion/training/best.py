"""Marks the best step of a training, and stops it early: likeness against overfitting.

`infusion.metrics.measures.balance` weighs the two.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only

from clipseg.weights import POCKET, POCKET_WEIGHTS
from clipseg.weights import load as load_clipseg
from infusion.inject import unedited
from infusion.metrics.measures.balance import Balance
from infusion.metrics.run.cache import Cache
from infusion.metrics.run.features import load_backbone
from infusion.metrics.run.options import Options, Tools, identity
from infusion.metrics.run.protocol import CONTEXT, Protocol
from infusion.metrics.run.stages import Stages
from infusion.metrics.run.subject import Checkpoint
from infusion.training.trainer import ConceptTrainer
from ldm.util.cli import UserError, find_device
from ldm.util.files import write

BEST = "best.safetensors"
logger = logging.getLogger(__name__)


class Networks(Tools):
    """CLIP and CLIPSeg by name, for configs.

    Args:
        clip: "pocket", or a folder, as for `infusion.metrics.run.features.load_backbone`.
        clipseg: "pocket", or a folder or file, as for `clipseg.weights.load`.
        device: where they run; "auto" is CUDA where there is some.

    Raises:
        ValueError: one is missing, or something else.
    """

    def __init__(self, clip: str, clipseg: str, device: str = "auto") -> None:
        where = find_device(device)
        networks = {"clip": load_backbone(clip, where), "clipseg": load_clipseg(clipseg).to(where)}
        hashes = {"clip": identity(clip), "clipseg": identity(POCKET_WEIGHTS if clipseg == POCKET else clipseg)}
        super().__init__(**networks, hashes=hashes)


def exhausted(balances: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` trials, at least 1, brought nothing better than one before them."""
    return len(balances) > patience and max(balances[:-patience]) >= max(balances[-patience:])


class BestConcept(pl.Callback):
    """Weighs the concept every so many optimiser steps and when training ends.

    `models/best.safetensors` is the concept of the highest balance so far, the first of equals; `models/best.json` has
    every trial, and the logger gets them as `best/…`. Prompts, seeds and noise are the same each time.

    Args:
        tools: a CLIP and a CLIPSeg.
        prompts: with {} for the concept; () takes the protocol's of the architecture.
        every: optimiser steps between two trials.
        early_stop: stop after so many trials in a row without a higher balance; 0 never does.
        samples: of each trial, at least 2. batch_size: how many at a time.
        steps, scale, seed: as in `StableDiffusion.sample`.
        strata: of LFD, see `infusion.metrics.measures.fisher`.

    Raises:
        ValueError: a number out of range, or a prompt without {}.
    """

    def __init__(
        self,
        tools: Tools,
        prompts: tuple[str, ...] = (),
        every: int = 50,
        early_stop: int = 0,
        samples: int = 16,
        batch_size: int = 8,
        steps: int = 15,
        scale: float = 7.5,
        seed: int = 0,
        strata: int = 5,
    ) -> None:
        if every < 1:
            raise UserError(f"every: must be at least 1, not {every}")
        if early_stop < 0:
            raise UserError(f"early_stop: must be at least 0, not {early_stop}")
        if odd := [prompt for prompt in prompts if "{}" not in prompt]:
            raise UserError(f"prompts: {odd[0]!r} has no {{}} for the concept")
        how = {"samples": samples, "batch_size": batch_size, "steps": steps, "scale": scale, "seed": seed}
        self.options = Options(("lfd", "w2", "clip_i"), strata=strata, **how)
        tools.check(self.options)
        self.tools, self.prompts, self.every, self.early_stop = tools, tuple(prompts), every, early_stop
        self.trials: list[dict[str, Any]] = []
        self._balance: Balance | None = None

    @property
    def best(self) -> dict[str, Any] | None:
        """The trial of the highest balance, the first of equals; None where nothing was gained."""
        found = max(self.trials, key=lambda trial: trial["balance"], default=None)
        return found if found and found["balance"] > 0 else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises ValueError for a training of anything else than one concept."""
        if not isinstance(pl_module, ConceptTrainer):
            raise UserError("callbacks.best: it weighs the training of one concept: leave it out of this one")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._judge(trainer)  # of a run that is done already

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: ConceptTrainer, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self._try(trainer, pl_module)
            self._judge(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: ConceptTrainer) -> None:
        self._try(trainer, pl_module)
        if trainer.is_global_zero:
            found = f"step {self.best['step']}, {self._folder(trainer) / BEST}" if self.best else "none: nothing gained"
            logger.info("best by likeness against overfitting: %s", found)

    def state_dict(self) -> dict[str, Any]:
        return {"trials": self.trials}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trials = list(state_dict["trials"])

    def _judge(self, trainer: pl.Trainer) -> None:
        """Stops a training whose last trials brought nothing better."""
        if self.early_stop:
            balances = [trial["balance"] for trial in self.trials]
            trainer.should_stop |= trainer.strategy.broadcast(exhausted(balances, self.early_stop))

    @rank_zero_only
    def _try(self, trainer: pl.Trainer, module: ConceptTrainer) -> None:
        step = trainer.global_step
        if step == 0 or step in (trial["step"] for trial in self.trials):  # between micro-batches, or resumed there
            return
        concept = module.concept()
        with unedited(module.sd.unet):
            if self._balance is None:
                self._balance = self._weigher(trainer, module)
            trial = self._balance.measure(Checkpoint.of(concept)).as_dict()
        self.trials.append(trial)
        if self.best is trial:
            concept.save(self._folder(trainer) / BEST)
        for one in trainer.loggers:
            one.log_metrics({f"best/{name}": value for name, value in trial.items() if name != "step"}, step)
        said = {"best": self.best and self.best["step"], "trials": self.trials}
        write(self._folder(trainer) / "best.json", (json.dumps(said, indent=2) + "\n").encode())

    def _weigher(self, trainer: pl.Trainer, module: ConceptTrainer) -> Balance:
        photos = (trainer.datamodule.images.images + 1) / 2
        prompts = self.prompts or tuple(Protocol.of(module.sd.architecture).prompts(CONTEXT, module.word.superclass))
        own = {"inverse_covariance": module.inverse_covariance, "mask_prompts": module.word.templates}
        tools = Tools(**vars(self.tools) | own)
        options = replace(self.options, precision="autocast" if "mixed" in str(trainer.precision) else "full")
        return Balance(Stages(module.sd, options, tools, Cache()), prompts, module.word.superclass, photos)

    @staticmethod
    def _folder(trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "models"
