"""What trainings of concepts have in common: a few learned tensors on a frozen base model, and nothing else kept."""

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.util.cli import UserError


def check_learning_rate(rate: float) -> None:
    """Raises ValueError for a rate of 0 or less, NaN, or above 1,000."""
    if not 0 < rate <= 1000:
        raise UserError(f"learning_rate: must be above 0 and at most 1,000, not {rate}")


class Learner(pl.LightningModule):
    """Resume state and checks.

    Attributes:
        tensors: what is kept, by name; those that require gradients are learned.
    """

    tensors: Mapping[str, Tensor]

    def on_fit_start(self) -> None:
        """Raises ValueError when the trainer's precision has cast the learned numbers to half precision."""
        if any(tensor.dtype != torch.float32 for tensor in self.tensors.values()):
            raise UserError("what is learned must stay in float32: use precision 32-true, bf16-mixed or 16-mixed")

    def state_dict(
        self, *, destination: dict[str, Tensor] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Tensor]:
        """The tensors alone: the base model is in its own file."""
        state = {} if destination is None else destination
        for name, tensor in self.tensors.items():
            state[prefix + name] = tensor if keep_vars else tensor.detach()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Always strict; raises ValueError as `check_state`."""
        self.check_state(state_dict)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state_dict[name])

    def check_state(self, state_dict: Mapping[str, Tensor]) -> None:
        """Raises ValueError for a tensor too few, too many, or of another shape."""
        raise NotImplementedError
