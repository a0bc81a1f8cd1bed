"""Shows what a concept looks like while it is being trained."""

import math
from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from infusion.sampling.sample import sample
from infusion.tokens import fill
from infusion.training.trainer import ConceptTrainer
from ldm.training.callbacks import EverySteps, write_grid
from ldm.util.cli import UserError, naming
from ldm.util.templates import check_template


class ConceptSamples(EverySteps):
    """Draws a grid every so many optimiser steps and when training ends, in `<run>/images/` and in TensorBoard.

    A column is a prompt and a seed; the upper row is the base model with the superclass, the lower one the concept.

    Args:
        prompts: with {} for the concept.
        every: optimiser steps between two grids.
        steps, scale, seed: as in `infusion.sample`.
    """

    def __init__(
        self, prompts: Sequence[str], every: int = 100, steps: int = 25, scale: float = 7.0, seed: int = 0
    ) -> None:
        super().__init__(every)
        if not 1 <= steps <= 999:
            raise UserError(f"steps: must be from 1 to 999, not {steps}")
        if not math.isfinite(scale):
            raise UserError(f"scale: must be a finite number, not {scale}")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed: must be from 0 to 2**63 - 1, not {seed}")
        for prompt in prompts:
            check_template("prompts", prompt)
        if not prompts:
            raise UserError("prompts: give at least one, with {} for the concept")
        self.prompts = list(prompts)
        self.settings = {"steps": steps, "scale": scale, "seed": seed}
        self._base: Tensor | None = None  # (B, 3, H, W): the same throughout

    def on_fit_start(self, trainer: pl.Trainer, pl_module: ConceptTrainer) -> None:
        """Raises ValueError for a prompt that cannot be drawn."""
        with naming("callbacks.samples: prompts"):
            pl_module.check_prompts(self.prompts)

    def act(self, trainer: pl.Trainer, module: ConceptTrainer) -> None:
        if self._base is None:
            with module.unedited():
                prompts = [fill(prompt, [module.word.superclass]) for prompt in self.prompts]
                self._base = module.sd.sample(prompts, **self.settings)
        concepts, inverse = [module.concept()], module.inverse_covariance
        customised = sample(module.sd, self.prompts, concepts, inverse_covariance=inverse, **self.settings)
        grid = write_grid(trainer, torch.cat([self._base, customised]), len(self.prompts))
        if grid is None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid.cpu(), trainer.global_step)
