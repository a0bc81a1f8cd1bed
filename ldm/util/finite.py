"""Numbers that are not finite end a training before they reach what is learned."""

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class NonFinite(ValueError):
    """A loss, gradient or learned number is NaN or infinite.

    Attributes:
        intact: whether what is learned is as it was after the last step.
    """

    def __init__(self, message: str, intact: bool) -> None:
        super().__init__(message)
        self.intact = intact


class Finite(pl.Callback):
    """Looks at every loss, at the gradients before each optimiser step, and at what is learned after it.

    Losses and gradients are judged before the optimiser step, where the gradients of several processes have been
    averaged, so that all of them see a fault of one. With a loss scaler (16-mixed) gradients that overflow are its
    business: it leaves the step out and scales less.

    Args:
        fault: "stop" raises `NonFinite`; "skip" leaves out the optimiser step, counts it and goes on. Learned numbers
            that are not finite stop in either case.

    Raises:
        ValueError: another word.
    """

    def __init__(self, fault: Literal["stop", "skip"] = "stop") -> None:
        if fault not in ("stop", "skip"):
            raise ValueError(f"non_finite: one of stop, skip is wanted, not {fault!r}")
        self.fault = fault
        self.skipped = 0
        self._files: list[str] = []  # of the micro-batches of this step
        self._step = 0
        self._found = ""

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, _: int) -> None:
        self._files += names(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if not self._found and not math.isfinite(loss.detach()):
            self._found = f"{self._where(trainer.global_step + 1)}: the loss is {loss.item():g}"

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [parameter.grad for parameter in learned(pl_module) if parameter.grad is not None]
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if not (self._found or scaled) and gradients and not math.isfinite(nn.utils.get_total_norm(gradients)):
            self._found = f"{self._where(trainer.global_step + 1)}: a gradient is not finite"
        if self._found and self.fault == "stop":
            advice = "lower model.params.learning_rate, look at these files, or leave such steps out by non_finite=skip"
            raise NonFinite(f"{self._found}; {advice}", intact=True)
        if self._found:
            self.skipped += 1
            logger.warning("warning: %s; the step is left out, %d so far", self._found, self.skipped)
            for parameter in learned(pl_module):
                parameter.grad = None
            self._found = ""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # between the micro-batches of one optimiser step
            return
        if not math.isfinite(nn.utils.get_total_norm([parameter.detach() for parameter in learned(pl_module)])):
            where = self._where(trainer.global_step)
            raise NonFinite(f"{where}: what is learned is not finite; lower model.params.learning_rate", intact=False)
        self._step, self._files = trainer.global_step, []

    def _where(self, step: int) -> str:
        files = f" (a batch of {', '.join(sorted(set(self._files)))})" if self._files else ""
        return f"step {step}{files}"


def learned(module: pl.LightningModule) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def names(batch: object) -> list[str]:
    """Names of a batch's files, wherever in it they are listed as `names`."""
    if not isinstance(batch, Mapping):
        return []
    return [*batch.get("names", ()), *(name for part in batch.values() for name in names(part))]
