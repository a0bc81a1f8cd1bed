"""What trainings of concepts have in common: a few learned tensors on a frozen base model, and nothing else kept."""

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldm.util.cli import UserError


def check_alike(own: Mapping[str, Tensor], others: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError, which begins with `what`, for other names or shapes."""
    if odd := sorted(own.keys() ^ others.keys()):
        raise UserError(f"{what}: {odd[0]} is in one of them only")
    for name, tensor in own.items():
        if tensor.shape != others[name].shape:
            raise UserError(f"{what}: {name} is {tuple(others[name].shape)}, not {tuple(tensor.shape)}")


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

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors alone: the base model is in its own file."""
        return {name: tensor.detach() for name, tensor in self.tensors.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Always strict; raises ValueError for a tensor too few, too many, or of another shape."""
        check_alike(self.tensors, state_dict, "the resume state does not fit")
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state_dict[name])
