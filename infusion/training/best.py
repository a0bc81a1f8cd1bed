"""Marks the best step of a training by likeness, and stops it early.

A trial draws samples of the concept, and `infusion.metrics.measures.best` says which trial is the best.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from infusion.metrics.measures import fidelity
from infusion.metrics.measures.best import best_of
from infusion.metrics.run.features import Backbone, load_backbone
from infusion.metrics.run.protocol import CONTEXT, Protocol
from infusion.training.callbacks import Drawing
from infusion.training.trainer import ConceptTrainer
from ldm.training.callbacks import write_grid
from ldm.util.cli import UserError, check_range, find_device
from ldm.util.files import write

BEST = "best.safetensors"
logger = logging.getLogger(__name__)


def best_trial(trials: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The best of trials in the order of their steps; None where nothing was gained."""
    best = best_of([trial["likeness"] - trial["base_likeness"] for trial in trials])
    return None if best is None else trials[best]


class BestConcept(Drawing):
    """Tries the concept every so many optimiser steps and when training ends.

    `models/best.safetensors` is the best concept so far, `images/best.png` its samples below the base model's;
    `models/best.json` has every trial, and the logger gets them as `best/…`.

    Args:
        network: tells likeness: a backbone, or what names one, as for `infusion.metrics.run.features.load_backbone`.
        prompts: with {} for the concept; () takes the protocol's of the architecture.
        every: optimiser steps between two trials.
        early_stop: stop after so many trials in a row without a better one; 0 never does.
        samples: of each trial. batch_size: how many at a time.
        steps, scale, seed: as in `infusion.sample`; the seeds are neither training's nor measured ones.

    Raises:
        ValueError: a number out of range, a prompt without {}, or no such network.
    """

    def __init__(
        self,
        network: Backbone | str,
        prompts: tuple[str, ...] = (),
        every: int = 50,
        early_stop: int = 0,
        samples: int = 16,
        batch_size: int = 8,
        steps: int = 15,
        scale: float = 7.5,
        seed: int = 3_000_000,
    ) -> None:
        super().__init__(prompts, every, steps, scale, seed, batch_size)
        check_range("early_stop", early_stop, 0)
        check_range("samples", samples, 1)
        self.network = load_backbone(network, find_device("auto")) if isinstance(network, str) else network
        self.early_stop, self.samples = early_stop, samples
        self.trials: list[dict[str, Any]] = []
        self._base_likeness, self._photos = 0.0, torch.empty(0)  # of the base model's samples; features (P, D)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises ValueError for a training of anything else than one concept."""
        if not isinstance(pl_module, ConceptTrainer):
            raise UserError("callbacks.best: it judges the training of one concept: leave it out of this one")
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: ConceptTrainer) -> None:
        super().on_train_start(trainer, pl_module)
        self._judge(trainer)  # of a run that is done already

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: ConceptTrainer, *_: object) -> None:
        super().on_train_batch_end(trainer, pl_module)
        if trainer.global_step % self.every == 0:
            self._judge(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: ConceptTrainer) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero:
            best, folder = best_trial(self.trials), Path(trainer.default_root_dir)
            logger.info("best by likeness: %s", f"step {best['step']}, {folder / 'models' / BEST}" if best else "none")

    def state_dict(self) -> dict[str, Any]:
        return {"trials": self.trials}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trials = list(state_dict["trials"])

    def _judge(self, trainer: pl.Trainer) -> None:
        """Stops a training whose last trials brought nothing better."""
        if self.early_stop:
            enough = len(self.trials) > self.early_stop
            stop = enough and best_trial(self.trials) is best_trial(self.trials[: -self.early_stop])
            trainer.should_stop |= trainer.strategy.broadcast(stop)  # the first process has the trials

    def act(self, trainer: pl.Trainer, module: ConceptTrainer) -> None:
        """A trial."""
        prompts = self.prompts or Protocol.of(module.sd.architecture).prompts(CONTEXT, module.word.superclass)
        concept, models = module.concept(), Path(trainer.default_root_dir) / "models"
        base, drawn = self.draw(module, concept, [prompts[i % len(prompts)] for i in range(self.samples)])
        if not len(self._photos):
            self._photos = self.network((trainer.datamodule.images.images + 1) / 2)
            self._base_likeness = self._likeness(base)
        likeness = {"likeness": self._likeness(drawn), "base_likeness": self._base_likeness}
        self.trials.append({"step": trainer.global_step} | likeness)
        best = best_trial(self.trials)
        if best is self.trials[-1]:
            concept.save(models / BEST)
            write_grid(trainer, torch.cat([base[:8], drawn[:8]]), len(base[:8]), "best")
        for one in trainer.loggers:
            said = {f"best/{name}": value for name, value in likeness.items()}
            one.log_metrics(said | {"best/step": best["step"] if best else 0}, trainer.global_step)
        content = {"best": best and best["step"], "trials": self.trials}
        write(models / "best.json", (json.dumps(content, indent=2) + "\n").encode())

    def _likeness(self, images: Tensor) -> float:
        """The mean likeness of images (N, 3, H, W) in [0, 1] to the photos."""
        return fidelity.pairwise(self.network(images), self._photos).mean().item()
