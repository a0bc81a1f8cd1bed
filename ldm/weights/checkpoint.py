"""Checkpoints in LDM's layout, or in diffusers': loaded strictly, straight to their device and dtype, and written."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.util import digests
from ldm.util.files import replacing
from ldm.weights.diffusers_layout import Folder, open_checkpoint
from ldm.weights.files import TensorFile
from ldm.weights.names import EMA, PREFIXES, ignored, match
from ldm.weights.recognise import guess

if TYPE_CHECKING:
    from ldm.pipeline import StableDiffusion

__all__ = [
    "PREFIXES",
    "SHOWN",
    "TensorFile",
    "guess",
    "has_averages",
    "load_component",
    "load_into",
    "load_part",
    "open_checkpoint",
    "save",
    "sha256",
]
SHOWN = 5  # names in an error message


def load_component(path: str | Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names, as stored.

    Raises:
        ValueError: the file cannot be read, or has no such tensor.
    """
    with TensorFile(path) as file:
        names = [name for name in file.shapes if name.startswith(prefix) and not ignored(name)]
        if not names:
            raise ValueError(f"{path}: no tensor is named {prefix}*")
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
        modules: prefix of the names in the file -> module; see `PREFIXES`. With the prefix "" the file may also be one
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
            raise ValueError(f"{path}: has no averaged weights ({EMA}*): load it without use_ema")
        found = match(file, modules, use_ema)
        if found.missing:
            raise ValueError(
                f"{path}: {len(found.missing)} of {found.expected} expected tensors are missing: "
                f"{_shown(found.missing)}; {guess(file)}"
            )
        if found.wrong:
            raise ValueError(
                f"{path}: {len(found.wrong)} tensors have other shapes: {_shown(found.wrong)}; {guess(file)}"
            )
        for prefix, module in modules.items():
            _materialise(prefix, module, device)
        for prefix, module in modules.items():
            for name, target in module.state_dict().items():
                _fill(target, file, found.sources[prefix][name])
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
        candidates = (PREFIXES[component], f"{component}.", "")
        prefix = next((prefix for prefix in candidates if any(name.startswith(prefix) for name in file.shapes)), "")
    load_into({prefix: module}, path, device=device)


def save(path: str | Path, pipeline: "StableDiffusion", dtype: torch.dtype = torch.float16) -> None:
    """Write a pipeline's UNet, autoencoder and text encoder into one `.safetensors` file in LDM's layout.

    Args:
        path: where to, ending in `.safetensors`; a file of that name is replaced once the new one is whole.
        pipeline: the one to write, without a concept injected.
        dtype: of every floating-point tensor in the file.

    Raises:
        ValueError: another ending.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name must end in .safetensors")
    tensors = {}
    for component, prefix in PREFIXES.items():
        for name, tensor in getattr(pipeline, component).state_dict().items():
            tensors[prefix + name] = stored(tensor, dtype)
    write(path, tensors, {"modelspec.architecture": pipeline.architecture})


def stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as files hold it: on the CPU, contiguous, and of that dtype where it is floating-point."""
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in one go: it is there whole, or not at all.

    Raises OSError for what the system does not allow, such as a full disk.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        try:
            save_file(contiguous, partial, metadata={"format": "pt"} | dict(metadata or {}))
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        _order_metadata(partial)


def _order_metadata(path: Path) -> None:
    """Sorts a safetensors file's metadata, which the library writes in another order each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        metadata = dict(sorted(header.pop("__metadata__").items()))
        text = json.dumps({"__metadata__": metadata} | header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # which it is, the words being the same
            file.seek(8)
            file.write(text.ljust(size))


def sha256(path: str | Path) -> str:
    """A file's SHA-256, in lowercase hexadecimal; a diffusers folder's is that of its parts' digests, one a line."""
    if Path(path).is_dir():
        with Folder(path) as folder:
            parts = [digests.sha256(folder.files[part].path) for part in sorted(folder.files)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return digests.sha256(path)


def _materialise(prefix: str, module: nn.Module, device: torch.device | str) -> None:
    """Give what is on the meta device room on a device; the values must all come from the file."""
    covered = module.state_dict().keys()
    pieces = chain(module.named_parameters(), module.named_buffers())
    unset = [name for name, tensor in pieces if tensor.is_meta and name not in covered]
    if unset:
        raise RuntimeError(f"{prefix}: no value for {_shown(unset)}, which are in no checkpoint")
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


def _fill(target: Tensor, file: TensorFile | Folder, sources: tuple[str, ...]) -> None:
    """Values of one tensor, from the tensors of the file that are it, one below the other; zero from none."""
    if not sources:
        target.zero_()
        return
    parts = [file.read(name) for name in sources]
    target.copy_((parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(target.shape))


def _shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
