"""Edits of weights: a base tensor W is read as W + s·ΔW, and is itself never touched.

They are torch's parametrizations, which any module takes; taking them off leaves the very same base tensor behind.
What depends on the call, such as its timesteps, is no edit of a weight: it changes a layer's output
(`outputs_changed`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ldm.util.cli import UserError

# behind the name of a tensor W, in a concept: A, B and α of a low-rank change; what takes the place of W. A difference
# has no ending.
DOWN, UP, ALPHA, WHOLE = ".down", ".up", ".alpha", ".whole"

TEXT, VAE = "text.", "vae."  # how tensors of a concept begin that are of another part of the model than the UNet


def in_model(name: str) -> str:
    """A concept's name of a tensor as the whole model has it."""
    return name if name.startswith((TEXT, VAE)) else f"unet.{name}"


def is_of_text(name: str) -> bool:
    """Whether a tensor, by either name, is of the text encoder."""
    return name.startswith(TEXT)


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
        down: A, (r, in), or (r, in, h, w) for a convolution's kernel. up: B, (out, r), or (out, r, 1, 1). See
            `as_parameter`.
        alpha: α.
        strength: s.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float, strength: float = 1.0) -> None:
        super().__init__()
        self.down, self.up = as_parameter(down), as_parameter(up)
        self.scale = strength * alpha / len(down)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.up), *self.down.shape[1:]))

    def forward(self, weight: Tensor) -> Tensor:
        change = self.scale * self.up.flatten(1) @ self.down.flatten(1)
        return weight + change.view(weight.shape).to(weight)


class Whole(Difference):
    """W + s·(W' − W): a weight W' in the place of W, as a `Difference` once W is known."""

    def from_base(self, base: Tensor) -> Difference:
        return Difference(self.difference.to(base.device) - base.float(), self.strength)


Edit = Difference | LowRank


def as_edits(tensors: Mapping[str, Tensor], strength: float = 1.0, alpha: float | None = None) -> dict[str, Edit]:
    """Tensor of a model -> what changes it, of a concept's tensors, each named by the one that it changes.

    Args:
        tensors: `W.down`, `W.up` and perhaps `W.alpha`, or `W.whole`, or `W` for a difference. Parameters are kept.
        strength: s of all.
        alpha: α where there is no `W.alpha`; None is the rank.

    Raises:
        ValueError: a low-rank change that lacks one of its two factors, or two changes of one tensor.
    """
    edits: dict[str, Edit] = {}
    for name, tensor in tensors.items():
        target = name.removesuffix(DOWN).removesuffix(UP).removesuffix(ALPHA).removesuffix(WHOLE)
        if name.endswith((UP, ALPHA)) and target + DOWN in tensors:
            continue
        if target in edits:
            raise UserError(f"the concept changes {target!r} in two ways")
        if name.endswith((DOWN, UP, ALPHA)):
            if lacking := [end for end in (DOWN, UP) if target + end not in tensors]:
                raise UserError(f"the concept lacks {target + lacking[0]!r}")
            up, own = tensors[target + UP], tensors.get(target + ALPHA)
            if tensor.ndim < 2 or up.ndim < 2 or up[0].numel() != len(tensor) or (own is not None and own.numel() != 1):
                raise UserError(f"{target}: A is {tuple(tensor.shape)} and B is {tuple(up.shape)}: no low-rank change")
            scale = len(tensor) if alpha is None else alpha
            edits[target] = LowRank(tensor, up, scale if own is None else own.item(), strength)
        else:
            edits[target] = (Whole if name.endswith(WHOLE) else Difference)(tensor, strength)
    return edits


def attach(module: nn.Module, edits: Mapping[str, Sequence[Edit]]) -> None:
    """Lay edits over tensors of a module, the first of each innermost.

    Args:
        edits: a tensor's name in the module -> what changes it, of the tensor's shape.

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
        base, (path, _, leaf) = module.get_parameter(name), name.rpartition(".")
        for edit in changes:
            known = edit.from_base(base.detach()) if isinstance(edit, Whole) else edit
            parametrize.register_parametrization(module.get_submodule(path), leaf, known.to(base.device), unsafe=True)


def detach(module: nn.Module) -> dict[str, list[Edit]]:
    """Take all edits off; returns them as `attach` takes them."""
    edits: dict[str, list[Edit]] = {}
    for path, owner in list(module.named_modules()):
        if parametrize.is_parametrized(owner):
            for leaf, parts in list(owner.parametrizations.items()):
                edits[f"{path}.{leaf}"] = list(parts)
                parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
    return edits


def merge(module: nn.Module, edits: Mapping[str, Sequence[Edit]]) -> None:
    """Puts edits into the tensors themselves, for good; raises ValueError as `attach`."""
    with torch.no_grad():
        attach(module, edits)
        for path, _, leaf in [name.rpartition(".") for name in edits]:
            parametrize.remove_parametrizations(module.get_submodule(path), leaf, leave_parametrized=True)


@contextmanager
def weights_edited(module: nn.Module, edits: Mapping[str, Sequence[Edit]]) -> Iterator[None]:
    """The module with exactly these edits inside the `with`; any others are set aside and put back afterwards."""
    previous = detach(module)
    try:
        attach(module, edits)
        yield
    finally:
        detach(module)
        attach(module, previous)


def find_layers(unet: nn.Module, changes: Sequence[tuple[str, nn.Module]]) -> list[tuple[nn.Module, nn.Module]]:
    """The layers whose outputs are to change, each with its change.

    Args:
        unet: without edited layers, in which names are others.
        changes: a linear layer's name in the UNet -> a module that is given the layer's input (B, N, in), its output
            (B, N, out) and the timesteps, and returns what takes the output's place. It may have a `shape` (out, in).

    Raises:
        ValueError: no such layer, or one of another shape.
    """
    found = []
    for name, change in changes:
        try:
            layer = unet.get_submodule(name)
        except AttributeError as error:
            raise UserError(f"the model has no layer {name!r} to change") from error
        if (shape := getattr(change, "shape", layer.weight.shape)) != layer.weight.shape:
            raise UserError(f"{name} is {tuple(layer.weight.shape)}, its change is {tuple(shape)}")
        found.append((layer, change))
    return found


@contextmanager
def outputs_changed(layers: Sequence[tuple[nn.Module, nn.Module]], timesteps: Tensor) -> Iterator[None]:
    """Inside the `with`, for one call of the UNet at timesteps (B,), layers as of `find_layers` give other outputs."""
    hooks = [layer.register_forward_hook(partial(_changed, change, timesteps)) for layer, change in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _changed(change: nn.Module, timesteps: Tensor, layer: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
    return change(given[0], output, timesteps)
