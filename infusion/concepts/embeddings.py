"""Learned words of other tools, as concepts of Textual Inversion: A1111, diffusers, sd-scripts, ComfyUI, Replicate.

A file has T vectors in place of one word. Here they take the place of T tokens of the prompt, whatever these are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from infusion.concepts.concept import Concept
from infusion.concepts.places import find_architecture, history
from infusion.methods.base import TOKENS
from ldm.util.cli import UserError
from ldm.weights.files import TensorFile

PLACEHOLDER = "* "  # one token of the tokenizer's, in the place of each vector
PAIRS = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"), ("emb", "emb2"))  # of SDXL's two encoders


def load(file: TensorFile, said: Mapping[str, Any]) -> Concept:
    """Raises ValueError for vectors that fit no base model."""
    read = {name: file.read(name) for name in file.shapes}
    token = file.content.get("name")  # of A1111's files
    if "string_to_param" in file.content or "emb_params" in read:
        if len(read) != 1:
            raise UserError(f"a learned word is one tensor, this file has {len(read)}: {', '.join(read)[:100]}")
        words = {"": list(read.values())}
    elif pair := next((pair for pair in PAIRS if set(pair) & read.keys()), None):
        if read.keys() != set(pair):
            raise UserError(f"a learned word of SDXL has {' and '.join(pair)}, this file {', '.join(read)[:100]}")
        words = {"": [read[name] for name in pair]}
    else:
        words = {name: [vectors] for name, vectors in read.items()}
        if (second := file.path.with_name(f"{file.path.stem}_2{file.path.suffix}")).is_file():
            with TensorFile(second) as other:  # SDXL's second encoder, by diffusers
                if words.keys() == other.shapes.keys():
                    words = {name: [*own, other.read(name)] for name, own in words.items()}
    found, vectors = stacked(words)
    token = token if isinstance(token, str) and token else found or file.path.stem
    architecture = find_architecture(file.metadata, said, vectors.shape[1])
    facts = history(file, said, token, PLACEHOLDER * len(vectors))
    return Concept({TOKENS: vectors}, architecture=architecture, method="textual_inversion", **facts)


def stacked(words: Mapping[str, Sequence[Tensor]]) -> tuple[str, Tensor]:
    """Word -> its vectors for each text encoder; as all words in one, and (T, D), the encoders side by side."""
    names = sorted(words, key=lambda name: (len(name), name))  # <s2> before <s10>
    rows = []
    for name in names:
        own = [torch.atleast_2d(vectors.float()) for vectors in words[name]]
        if any(vectors.ndim != 2 for vectors in own) or len({len(vectors) for vectors in own}) != 1:
            raise UserError(f"the word {name[:60]!r} has vectors {[tuple(vectors.shape) for vectors in own]}")
        rows.append(torch.cat(own, dim=1))
    if len({row.shape[1] for row in rows}) != 1 or not 0 < sum(map(len, rows)) <= 75:
        raise UserError(f"its words have vectors {[tuple(row.shape) for row in rows][:9]}, which is no learned word")
    return "".join(names), torch.cat(rows)
