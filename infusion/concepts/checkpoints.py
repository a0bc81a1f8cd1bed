"""Fine-tuned checkpoints, in LDM's layout or diffusers' folders, as concepts of DreamBooth: every weight is another."""

from collections.abc import Mapping
from typing import Any

from infusion.concepts.concept import Concept
from infusion.concepts.places import find_architecture, history, skeleton
from infusion.deltas import WHOLE
from ldm.util.cli import UserError
from ldm.weights.checkpoint import listed, read_tensor
from ldm.weights.diffusers_layout import Folder
from ldm.weights.files import TensorFile
from ldm.weights.names import by_prefix, match, prefix_of
from ldm.weights.recognise import recognise


def load(file: TensorFile | Folder, said: Mapping[str, Any]) -> Concept:
    """Raises ValueError for a file that lacks a tensor of the base model, or has one beside it."""
    kind = recognise(file)
    if not kind.architectures:
        raise UserError(f"no concept file; it looks like {kind.says}")
    architecture = said.get("architecture") or kind.architectures[0]
    if not said.get("architecture") and len(kind.architectures) > 1 and file.metadata.get("modelspec.architecture"):
        architecture = find_architecture(file.metadata, said, None)
    sd = skeleton(architecture)
    modules = dict(sd.named_children())
    found = match(file, by_prefix(modules))
    for what, names in (("lacks", found.missing), ("differs in", found.wrong), ("also has", found.unexpected)):
        if names:
            raise UserError(f"a checkpoint of {architecture} that {what} {listed(names)}")
    tensors = {}
    for component, module in modules.items():
        start = "" if component == "unet" else f"{component}."
        for name, tensor in module.state_dict().items():
            if stored := found.sources[prefix_of(component, module)][name]:
                tensors[start + name + WHOLE] = read_tensor(name, tensor.shape, file, stored)
    facts = history(file, said)
    return Concept(tensors, architecture=architecture, method="dreambooth", options={"identifier": ""}, **facts)
