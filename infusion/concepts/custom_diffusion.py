"""Custom Diffusion's files, of diffusers and of the authors: whole weights of the cross-attentions, and words.

A word that lies beside the weights in a file of its own, `<new1>.bin` or `<new1>.safetensors`, is read with them.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from infusion.concepts.concept import Concept
from infusion.concepts.embeddings import PLACEHOLDER, stacked
from infusion.concepts.places import find_architecture, find_place, history, key, places, skeleton
from infusion.deltas import DOWN, UP, WHOLE
from infusion.methods.base import TOKENS
from ldm.util.cli import UserError
from ldm.util.defaults import PREFIXES
from ldm.weights.files import TensorFile, tensors_of

THEIRS = re.compile(r"(?:unet\.)?(.+)\.processor\.(to_[kqv]|to_out)_custom_diffusion(\.0)?\.(weight|bias)")
LDM = PREFIXES["unet"]


def load(file: TensorFile, said: Mapping[str, Any]) -> Concept:
    """Raises ValueError for a tensor that has no place in the base model."""
    changes, words = _contents(file)
    taking = (change for name, change in changes.items() if re.search(r"to_[kv]\.weight", name))  # text
    width = next(((c if isinstance(c, Tensor) else c[0]).shape[-1] for c in taking), None)
    architecture = find_architecture(file.metadata, said, width)
    known = {ending: places(skeleton(architecture), f".{ending}") for ending in ("weight", "bias")}
    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        module, _, ending = name.rpartition(".")
        place = find_place(known.get(ending, {}), key("unet", module), architecture)
        if isinstance(change, Tensor):
            tensors[place.tensor + WHOLE] = change
        else:
            down, up = change
            tensors |= {place.tensor + DOWN: down, place.tensor + UP: up}
    if not tensors:
        raise UserError("has words of Custom Diffusion and no weights")
    token = placeholder = ""
    if words:
        token, tensors[TOKENS] = stacked(words)
        placeholder = PLACEHOLDER * len(tensors[TOKENS]) + said.get("superclass", "")
    facts = history(file, said, token, placeholder)
    return Concept(tensors, architecture=architecture, method="custom_diffusion", options={"identifier": ""}, **facts)


def _contents(file: TensorFile) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """The UNet's tensor -> its new value, or A and B of its change; words, as `stacked` takes them."""
    if "modifier_token" in file.content:
        unet, tokens = (file.content.get(name) for name in ("unet", "modifier_token"))
        unet, tokens = (value if isinstance(value, Mapping) else {} for value in (unet, tokens))
        changes: dict[str, Any] = dict(tensors_of(unet))
        for name, value in unet.items():
            if isinstance(value, Mapping):
                both = tensors_of(value)
                if both.keys() != {"u", "v"}:
                    raise UserError(f"the change of {str(name)[:100]} is no product of u and v")
                changes[name] = both["v"], both["u"]
        words = {}
        for token, found in tokens.items():
            vectors = found if isinstance(found, list | tuple) else [found]
            words[str(token)] = list(tensors_of({str(i): vector for i, vector in enumerate(vectors)}).values())
            if not len(vectors) == len(words[str(token)]) <= 2:
                raise UserError(f"the word {str(token)[:60]} has {len(vectors)} vectors: 1 is wanted, of SDXL 2")
        return changes, words
    changes, words = {}, {}
    for name in file.shapes:
        if name == "embed":
            words = {"<new1>": [file.read(name)]}
        elif match := THEIRS.fullmatch(name):
            changes[f"{match[1]}.{match[2]}{match[3] or ''}.{match[4]}"] = file.read(name)
        else:
            changes[name.removeprefix(LDM)] = file.read(name)
    for beside in sorted([*file.path.parent.glob("<*>.bin"), *file.path.parent.glob("<*>.safetensors")]):
        with TensorFile(beside) as other:
            words |= {name: [other.read(name)] for name in other.shapes}
    return changes, words
