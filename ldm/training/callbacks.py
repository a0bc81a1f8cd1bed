"""What training shows and writes beside its resume state."""

import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torchvision.utils import make_grid, save_image

from ldm.util.cli import UserError, check_range
from ldm.util.files import replacing
from ldm.weights.checkpoint import stored, write

logger = logging.getLogger(__name__)


class StepBar(TQDMProgressBar):
    """Counts the optimiser steps of the whole run, resumed or not: `120/500 [00:30<01:35, 3.98 steps/s, loss=…]`."""

    def init_train_tqdm(self) -> Tqdm:
        steps = self.trainer.estimated_stepping_batches
        return Tqdm(
            desc=self.train_description,
            total=steps if 0 < steps < math.inf else None,
            initial=self.trainer.global_step,
            unit=" steps",
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: object) -> None:
        """Nothing: Lightning would begin to count the batches of an epoch."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if self.is_enabled:
            self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))  # which shows both

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class EverySteps(pl.Callback):
    """Acts every so many optimiser steps and when training ends, once a step, on the first process.

    Args:
        every: optimiser steps, at least 1.
    """

    def __init__(self, every: int) -> None:
        check_range("every", every, 1)
        self.every = every
        self._done = 0

    def act(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """What is done."""
        raise NotImplementedError

    @rank_zero_only
    def now(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Acts, unless it has at this step: between the micro-batches of one optimiser step, or before a resume."""
        if trainer.global_step != self._done:
            self.act(trainer, module)
            self._done = trainer.global_step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._done = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step % self.every == 0:
            self.now(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.now(trainer, pl_module)


class ExportWeights(pl.Callback):
    """Writes the module's `weights()` to `<run>/models/weights.safetensors` when training ends, in float16.

    Listed behind a weight-averaging callback it writes the averaged weights.
    """

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / "models" / "weights.safetensors"
        write(path, {name: stored(tensor, torch.float16) for name, tensor in module.weights().items()})


class Offload(pl.Callback):
    """Moves parts of a concept's frozen base model to the CPU when training starts, so that a small card has room.

    The autoencoder has done its work by then: latents are cached. So has the text encoder soon, since each prompt is
    encoded once, unless the method learns a word.

    Args:
        parts: of the module's `sd`: "vae", "text".
        device: where to.
    """

    def __init__(self, parts: Sequence[str] = ("vae", "text"), device: str = "cpu") -> None:
        if odd := [part for part in parts if part not in ("vae", "text")]:
            raise UserError(f"parts: training can do without vae and text, not without {odd[0]!r}")
        self.parts, self.device = tuple(parts), device

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for part in self.parts:
            getattr(module.sd, part).to(self.device)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def write_grid(trainer: pl.Trainer, images: Tensor, columns: int, name: str = "") -> Tensor | None:
    """Writes `<run>/images/<name>.png` and returns the grid (3, H', W'); warns of images that are not finite.

    Args:
        images: (B, 3, H, W) in [0, 1], B a multiple of `columns`.
        name: "" is that of the step, such as step=000500.
    """
    path = Path(trainer.default_root_dir) / "images" / f"{name or f'step={trainer.global_step:06d}'}.png"
    if not images.isfinite().all():
        logger.warning("warning: samples at step %d are not finite: %s is not written", trainer.global_step, path)
        return None
    grid = make_grid(images, columns)
    with replacing(path) as partial:
        save_image(grid, partial)
    return grid


class Reconstructions(pl.Callback):
    """Every `every` steps, images above their reconstructions, in `<run>/images/`."""

    def __init__(self, every: int = 500):
        self.every = every

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch: dict, index: int
    ) -> None:
        if trainer.global_step % self.every:
            return
        images = batch["images"][:8]
        with torch.no_grad():
            decoded = module.vae.decode(module.vae.encode(images)).float().clamp(-1, 1)
        write_grid(trainer, torch.cat([images, decoded]) / 2 + 0.5, len(images))


class Samples(EverySteps):
    """Every `every` steps, a grid of samples in `<run>/images/`: a column per prompt, `rows` seeds, always the same.

    The module's current weights are sampled, not averaged ones.
    """

    def __init__(self, prompts: list[str], every: int = 1000, rows: int = 2, steps: int = 25, scale: float = 5.0):
        super().__init__(every)
        self.prompts, self.rows, self.steps, self.scale = prompts, rows, steps, scale

    def act(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        images = module.sd.sample(self.prompts * self.rows, steps=self.steps, scale=self.scale)
        write_grid(trainer, images, len(self.prompts))
