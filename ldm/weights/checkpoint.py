"""Checkpoints in LDM's layout, or in diffusers': loaded strictly, straight to their device and dtype, and written."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.util import files
from ldm.util.cli import UserError
from ldm.weights.diffusers_layout import Folder, open_checkpoint, sha256, transposes
from ldm.weights.files import TensorFile, pieces
from ldm.weights.names import EMA, PREFIXES, by_prefix, ignored, match, prefix_of
from ldm.weights.recognise import guess

__all__ = ["PREFIXES", "load_component", "load_into", "load_part", "open_checkpoint", "save", "sha256", "write"]
SHOWN = 5  # names in an error message


def load_component(path: str | Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names, as stored.

    Raises:
        ValueError: the file cannot be read, or has no such tensor.
    """
    with TensorFile(path) as file:
        names = [name for name in file.shapes if name.startswith(prefix) and not ignored(name)]
        if not names:
            raise UserError(f"{path}: no tensor is named {prefix}*")
        return {name.removeprefix(prefix): file.read(name) for name in names}


def load_into(
    modules: Mapping[str, nn.Module], path: str | Path, use_ema: bool = False, device: torch.device | str = "cpu"
) -> list[str]:
    """Load a file into modules, strictly: every tensor that a module runs must be there with its shape.

    Nothing is changed unless everything fits. Values take the modules' dtypes. Modules built on the meta device come to
    `device`; the parameters of the others stay the same objects where they are. Tensors are read one at a time, so that
    the memory needed is that of the modules and little more. Tensors that a module never runs
    (`ldm.weights.diffusers_layout.unrun`) become zero where the file lacks them.

    Args:
        modules: prefix of the names in the file -> module; see `prefix_of`. With the prefix "" the file may also be one
            part of a diffusers folder.
        path: a file in LDM's layout, where CLIP's text tower may lack the level `text_model`; or a diffusers folder.
        use_ema: take the averaged weights of the UNet, `model_ema.*`.
        device: for modules on the meta device.

    Returns:
        Sorted names of the tensors in the file that no module has, but for what old files have besides: averages,
        `position_ids` and the tables of the noise schedule.

    Raises:
        ValueError: the file cannot be read, a tensor is missing or has another shape, or there are no averages.
    """
    with open_checkpoint(path) as file:
        if use_ema and not any(name.startswith(EMA) for name in file.shapes):
            raise UserError(f"{path}: has no averaged weights ({EMA}*): load it without use_ema")
        found = match(file, modules, use_ema)
        for names, fault in ((found.missing, "are missing"), (found.wrong, "have other shapes")):
            if names:
                which = "" if len(names) == found.expected else f": {listed(names)}"
                raise UserError(
                    f"{path}: {len(names)} of {found.expected} expected tensors {fault}{which}; {guess(file)}"
                )
        for prefix, module in modules.items():
            _materialise(prefix, module, device)
        for prefix, module in modules.items():
            for name, target in module.state_dict().items():
                if sources := found.sources[prefix][name]:
                    target.copy_(read_tensor(name, target.shape, file, sources))
                else:
                    target.zero_()
    return found.unexpected


def has_averages(path: str | Path) -> bool:
    """Whether a checkpoint has averaged weights, `model_ema.*`; raises ValueError if it cannot be read."""
    with open_checkpoint(path) as file:
        return any(name.startswith(EMA) for name in file.shapes)


def load_part(component: str, module: nn.Module, path: str | Path, device: torch.device | str = "cpu") -> None:
    """Load one component (unet, vae or text) from a file that names its tensors as a checkpoint or the module does.

    Raises:
        ValueError: as `load_into`.
    """
    with TensorFile(path) as file:
        candidates = (prefix_of(component, module), f"{component}.", "")
        prefix = next((prefix for prefix in candidates if any(name.startswith(prefix) for name in file.shapes)), "")
    load_into({prefix: module}, path, device=device)


def save(
    path: str | Path, modules: Mapping[str, nn.Module], architecture: str, dtype: torch.dtype = torch.float16
) -> None:
    """Write UNet, autoencoder and text encoder into one `.safetensors` file in LDM's layout.

    Args:
        path: where to, ending in `.safetensors`; a file of that name is replaced once the new one is whole.
        modules: component (unet, vae, text) -> module, without a concept injected.
        architecture: the backbone's name.
        dtype: of every floating-point tensor in the file.

    Raises:
        ValueError: another ending.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: the name must end in .safetensors")
    tensors = {name: stored(tensor, dtype) for name, tensor in checkpoint_tensors(modules).items()}
    write(path, tensors, {"modelspec.architecture": architecture})


def checkpoint_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Tensors of components (unet, vae, text) under their names in a checkpoint."""
    prefixes = by_prefix(modules).items()
    return {prefix + name: tensor for prefix, module in prefixes for name, tensor in module.state_dict().items()}


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as files hold it: on the CPU, contiguous, and of that dtype where it is floating-point."""
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file: it is there whole, or not at all; raises OSError as `ldm.util.files`."""
    with files.replacing(path) as partial, partial.open("wb") as file:
        file.writelines(pieces(tensors, {"format": "pt"} | dict(metadata or {})))


def _materialise(prefix: str, module: nn.Module, device: torch.device | str) -> None:
    """Give what is on the meta device room on a device; the values must all come from the file."""
    covered = module.state_dict().keys()
    named = chain(module.named_parameters(), module.named_buffers())
    unset = [name for name, tensor in named if tensor.is_meta and name not in covered]
    if unset:
        raise RuntimeError(f"{prefix}: no value for {listed(unset)}, which are in no checkpoint")
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def read_tensor(name: str, shape: torch.Size, file: TensorFile | Folder, sources: tuple[str, ...]) -> Tensor:
    """A module's tensor as stored, of the tensors of the file that are it, one below the other."""
    parts = [file.read(source) for source in sources]
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    return values.mT if transposes(name, sources) else values.reshape(shape)


def listed(names: Sequence[str]) -> str:
    """The first names of a long list, for an error message."""
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
