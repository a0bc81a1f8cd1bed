"""Edits of weights: a base tensor W is read as W + s·ΔW, and is itself never touched.

They are torch's parametrizations, which any module takes; taking them off leaves the very same base tensor behind.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm.util.cli import UserError


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter as it is, so that it can be learned; any other tensor as a fixed parameter in float32."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach().float(), requires_grad=False)


class Difference(nn.Module):
    """W + s·ΔW, with ΔW of W's own shape.

    Args:
        difference: ΔW, see `as_parameter`.
        strength: s.
    """

    def __init__(self, difference: Tensor, strength: float = 1.0) -> None:
        super().__init__()
        self.difference, self.strength = as_parameter(difference), strength

    @property
    def shape(self) -> torch.Size:
        return self.difference.shape

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.strength * self.difference).to(weight)


class LowRank(nn.Module):
    """W + s·(α / r)·B A (Hu et al. 2021, arXiv 2106.09685, eq. 3).

    Args:
        down: A, (r, in). up: B, (out, r). See `as_parameter`.
        alpha: α.
        strength: s.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float, strength: float = 1.0) -> None:
        super().__init__()
        self.down, self.up = as_parameter(down), as_parameter(up)
        self.scale = strength * alpha / len(down)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.up), self.down.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.scale * self.up @ self.down).to(weight)


def attach(module: nn.Module, edits: Mapping[str, Sequence[Difference | LowRank]]) -> None:
    """Lay edits over tensors of a module, the first of each innermost.

    Args:
        edits: a tensor's name in the module -> modules such as `Difference`, of the tensor's shape.

    Raises:
        ValueError: no such tensor, or one of another shape.
    """
    for name, changes in edits.items():
        try:
            base = module.get_parameter(name)
        except AttributeError as error:
            raise UserError(f"the model has no tensor {name!r} to change") from error
        for edit in changes:
            if edit.shape != base.shape:
                raise UserError(f"{name} is {tuple(base.shape)}, its change is {tuple(edit.shape)}")
    for name, changes in edits.items():
        device, (path, _, leaf) = module.get_parameter(name).device, name.rpartition(".")
        for edit in changes:
            parametrize.register_parametrization(module.get_submodule(path), leaf, edit.to(device), unsafe=True)


def detach(module: nn.Module) -> dict[str, list[Difference | LowRank]]:
    """Take all edits off; returns them as `attach` takes them."""
    edits: dict[str, list[Difference | LowRank]] = {}
    for path, owner in list(module.named_modules()):
        if parametrize.is_parametrized(owner):
            for leaf, parts in list(owner.parametrizations.items()):
                edits[f"{path}.{leaf}"] = list(parts)
                parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
    return edits


@contextmanager
def weights_edited(module: nn.Module, edits: Mapping[str, Sequence[Difference | LowRank]]) -> Iterator[None]:
    """The module with exactly these edits inside the `with`; any others are set aside and put back afterwards."""
    previous = detach(module)
    try:
        attach(module, edits)
        yield
    finally:
        detach(module)
        attach(module, previous)
