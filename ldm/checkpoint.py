"""Checkpoint files in LDM's layout: read strictly, one component at a time, and written."""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from ldm.pipeline import StableDiffusion

# component (attribute of StableDiffusion) -> what its tensors' names begin with
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model."}
SHOWN = 5  # names in an error message


class TensorFile:
    """Tensors of a `.safetensors` or `.ckpt` file by name, read one at a time; a context manager.

    A `.ckpt` file is a pickle: only tensors and plain containers are unpickled. Tensors nested under `state_dict`
    are found there.

    Attributes:
        shapes: the shape of every tensor, by name.

    Raises:
        ValueError: no such file, or not one that can be read safely.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: no such file")
        self._stack = ExitStack()
        try:
            if self.path.suffix == ".safetensors":
                file = self._stack.enter_context(safe_open(self.path, framework="pt"))
                self._read = file.get_tensor
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            else:
                tensors = _load_pickle(self.path)
                self._read = tensors.__getitem__
                self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise ValueError(f"{path}: not a checkpoint that can be read safely ({error})") from error

    def read(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU, as stored."""
        return self._read(name)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def load_component(path: str | Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names, as stored.

    Raises:
        ValueError: the file cannot be read, or has no such tensor.
    """
    with TensorFile(path) as file:
        names = [name for name in file.shapes if name.startswith(prefix) and not _ignored(name)]
        if not names:
            raise ValueError(f"{path}: no tensor is named {prefix}*")
        return {name.removeprefix(prefix): file.read(name) for name in names}


def load_into(modules: Mapping[str, nn.Module], path: str | Path) -> list[str]:
    """Load a file into modules, strictly: every tensor that a module has must be there with its shape.

    Nothing is changed unless everything fits. Values take the modules' dtypes. Modules built on the meta device
    come to the CPU; the parameters of the others stay the same objects.

    Args:
        modules: prefix of the names in the file -> module; see `PREFIXES`.
        path: a file in LDM's layout.

    Returns:
        Sorted names of the tensors in the file that no module has; `position_ids`, a constant of old files, aside.

    Raises:
        ValueError: the file cannot be read, or a tensor is missing or has another shape.
    """
    with TensorFile(path) as file:
        expected = {prefix: module.state_dict() for prefix, module in modules.items()}
        shapes = {prefix + name: tuple(t.shape) for prefix, state in expected.items() for name, t in state.items()}
        missing = [name for name in shapes if name not in file.shapes]
        if missing:
            raise ValueError(
                f"{path}: {len(missing)} of {len(shapes)} expected tensors are missing: {_shown(missing)}. "
                "Is it a checkpoint of this architecture?"
            )
        wrong = [f"{name} {file.shapes[name]} instead of {shapes[name]}" for name in shapes
                 if file.shapes[name] != shapes[name]]  # fmt: skip
        if wrong:
            raise ValueError(
                f"{path}: {len(wrong)} tensors have other shapes: {_shown(wrong)}. "
                "Is it a checkpoint of this architecture?"
            )
        for prefix, module in modules.items():
            state = {name: file.read(prefix + name).to(t.dtype) for name, t in expected[prefix].items()}
            module.load_state_dict(state, assign=any(t.is_meta for t in expected[prefix].values()))
            unset = [name for name, t in chain(module.named_parameters(), module.named_buffers()) if t.is_meta]
            if unset:
                raise RuntimeError(f"{prefix}: no value for {_shown(unset)}, which are in no checkpoint")
        return sorted(name for name in file.shapes if name not in shapes and not _ignored(name))


def save(path: str | Path, pipeline: "StableDiffusion", dtype: torch.dtype = torch.float16) -> None:
    """Write a pipeline's UNet, autoencoder and text encoder into one `.safetensors` file in LDM's layout.

    Args:
        path: where to, ending in `.safetensors`.
        pipeline: the one to write, without a concept injected.
        dtype: of every floating-point tensor in the file.

    Raises:
        ValueError: another ending.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: the name must end in .safetensors")
    tensors = {}
    for component, prefix in PREFIXES.items():
        for name, tensor in getattr(pipeline, component).state_dict().items():
            target = dtype if tensor.is_floating_point() else tensor.dtype
            tensors[prefix + name] = tensor.detach().to("cpu", target).contiguous()
    save_file(tensors, path, metadata={"format": "pt", "modelspec.architecture": pipeline.architecture})


def sha256(path: str | Path) -> str:
    """The file's SHA-256, in lowercase hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_pickle(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds no state dict but a {type(content).__name__}")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _ignored(name: str) -> bool:
    return name.endswith("embeddings.position_ids")


def _shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
