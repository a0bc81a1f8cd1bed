"""Shows what a concept looks like while it is being trained."""

import math
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from infusion.inject import unedited
from infusion.sampling.sample import sample
from infusion.tokens import fill
from infusion.training.trainer import ConceptTrainer
from ldm.training.callbacks import write_grid
from ldm.util.cli import UserError


class ConceptSamples(pl.Callback):
    """Draws a grid every so many optimiser steps and when training ends, in `<run>/images/` and in TensorBoard.

    A column is a prompt and a seed; the upper row is the base model with the superclass, the lower one the concept.

    Args:
        prompts: with {} for the concept.
        every: optimiser steps between two grids.
        steps, scale, seed: as in `infusion.sample`.

    Raises:
        ValueError: no prompts, one without {}, or `every` below 1.
    """

    def __init__(
        self, prompts: Sequence[str], every: int = 100, steps: int = 25, scale: float = 7.0, seed: int = 0
    ) -> None:
        if every < 1:
            raise UserError(f"every: must be at least 1, not {every}")
        if not 1 <= steps <= 999:
            raise UserError(f"steps: must be from 1 to 999, not {steps}")
        if not math.isfinite(scale):
            raise UserError(f"scale: must be a finite number, not {scale}")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed: must be from 0 to 2**63 - 1, not {seed}")
        for prompt in prompts:
            if "{}" not in prompt or set("{}") & set(prompt.replace("{}", "")):
                raise UserError(
                    f"prompts: every one must have {{}} for the concept and no other braces, not {prompt!r}"
                )
        if not prompts:
            raise UserError("prompts: give at least one, with {} for the concept")
        self.prompts = list(prompts)
        self.every = every
        self.steps, self.scale, self.seed = steps, scale, seed
        self._base: Tensor | None = None  # (B, 3, H, W): the same throughout
        self._drawn = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: ConceptTrainer) -> None:
        self._drawn = trainer.global_step  # of the run that this one resumes, or 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: ConceptTrainer, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: ConceptTrainer) -> None:
        self._draw(trainer, pl_module)

    @rank_zero_only
    def _draw(self, trainer: pl.Trainer, module: ConceptTrainer) -> None:
        if trainer.global_step == self._drawn:  # between the micro-batches of one optimiser step
            return
        self._drawn = trainer.global_step
        settings = {"steps": self.steps, "scale": self.scale, "seed": self.seed}
        if self._base is None:
            with unedited(module.sd.unet):
                prompts = [fill(prompt, [module.word.superclass]) for prompt in self.prompts]
                self._base = module.sd.sample(prompts, **settings)
        concepts, inverse = [module.concept()], module.inverse_covariance
        customised = sample(module.sd, self.prompts, concepts, inverse_covariance=inverse, **settings)
        grid = write_grid(trainer, torch.cat([self._base, customised]), len(self.prompts))
        if grid is None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid.cpu(), self._drawn)
