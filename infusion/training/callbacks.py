"""Draws a concept while it is being trained, beside the base model."""

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from infusion.concepts.concept import Concept
from infusion.sampling.sample import sample
from infusion.tokens import fill
from infusion.training.trainer import ConceptTrainer
from ldm.training.callbacks import EverySteps, write_grid
from ldm.util.cli import UserError, check_range, naming
from ldm.util.templates import check_template


class Drawing(EverySteps):
    """Draws prompts every so many optimiser steps and when training ends.

    Args:
        prompts: with {} for the concept.
        every: optimiser steps between two drawings.
        steps, scale, seed, batch_size: as in `infusion.sample`.

    Raises:
        ValueError: a number out of range, or a prompt without {}.
    """

    def __init__(
        self, prompts: Sequence[str], every: int, steps: int, scale: float, seed: int, batch_size: int | None = None
    ) -> None:
        super().__init__(every)
        check_range("steps", steps, 1, 999)
        check_range("scale", scale)
        check_range("seed", seed, 0, 2**63 - 1)
        for prompt in prompts:
            check_template("prompts", prompt)
        self.prompts = list(prompts)
        self.settings = {"steps": steps, "scale": scale, "seed": seed, "batch_size": batch_size}
        self._base: Tensor | None = None  # (B, 3, H, W): the same throughout

    def on_fit_start(self, trainer: pl.Trainer, pl_module: ConceptTrainer) -> None:
        """Raises ValueError for a prompt that cannot be drawn."""
        with naming(f"{type(self).__name__}: prompts"):
            pl_module.check_prompts(self.prompts)

    def draw(self, module: ConceptTrainer, concept: Concept, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) of the base model with the superclass, and of the concept, at the same seeds."""
        if self._base is None:
            with module.unedited():
                plain = [fill(prompt, [module.word.superclass]) for prompt in prompts]
                self._base = sample(module.sd, plain, **self.settings)
        inverse = module.inverse_covariance
        return self._base, sample(module.sd, prompts, [concept], inverse_covariance=inverse, **self.settings)


class ConceptSamples(Drawing):
    """Draws a grid, in `<run>/images/` and in TensorBoard; arguments as of `Drawing`.

    A column is a prompt and a seed; the upper row is the base model with the superclass, the lower one the concept.
    """

    def __init__(
        self, prompts: Sequence[str], every: int = 100, steps: int = 25, scale: float = 7.0, seed: int = 0
    ) -> None:
        super().__init__(prompts, every, steps, scale, seed)
        if not prompts:
            raise UserError("prompts: give at least one, with {} for the concept")

    def act(self, trainer: pl.Trainer, module: ConceptTrainer) -> None:
        images = torch.cat(self.draw(module, module.concept(), self.prompts))
        grid = write_grid(trainer, images, len(self.prompts))
        if grid is None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid.cpu(), trainer.global_step)
