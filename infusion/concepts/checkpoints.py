"""Fine-tuned checkpoints, in LDM's layout or diffusers' folders, as concepts of DreamBooth: every weight is another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from infusion.concepts.concept import Concept
from infusion.concepts.places import find_architecture, history, skeleton
from infusion.deltas import WHOLE
from ldm.util.cli import UserError
from ldm.util.defaults import PREFIXES
from ldm.weights.checkpoint import listed
from ldm.weights.diffusers_layout import Folder
from ldm.weights.files import TensorFile
from ldm.weights.names import match
from ldm.weights.recognise import guess, is_whole, recognise


def fits(file: TensorFile | Folder) -> bool:
    return is_whole(file)


def load(file: TensorFile | Folder, said: Mapping[str, Any]) -> Concept:
    """Raises ValueError for a file that lacks a tensor of the base model, or has one beside it."""
    kind = recognise(file)
    if not kind.architectures:
        raise UserError(f"no concept file; {guess(file)}")
    architecture = said.get("architecture") or kind.architectures[0]
    if not said.get("architecture") and len(kind.architectures) > 1 and file.metadata.get("modelspec.architecture"):
        architecture = find_architecture(file.metadata, said, None)
    sd = skeleton(architecture)
    found = match(file, {prefix: getattr(sd, component) for component, prefix in PREFIXES.items()})
    for what, names in (("lacks", found.missing), ("differs in", found.wrong), ("also has", found.unexpected)):
        if names:
            raise UserError(f"a checkpoint of {architecture} that {what} {listed(names)}")
    tensors = {}
    for component, prefix in PREFIXES.items():
        start = "" if component == "unet" else f"{component}."
        for name, shape in ((name, tensor.shape) for name, tensor in getattr(sd, component).state_dict().items()):
            if stored := found.sources[prefix][name]:
                parts = [file.read(part) for part in stored]
                whole = torch.cat(parts) if len(parts) > 1 else parts[0]
                tensors[start + name + WHOLE] = whole.reshape(shape)
    path = Path(file.path)
    options = {"identifier": ""}
    facts = history(file.metadata, said, path)
    return Concept(tensors, architecture=architecture, method="dreambooth", options=options, **facts)
