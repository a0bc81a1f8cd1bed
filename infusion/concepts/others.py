"""Files of other tools: which of the modules of this package reads one as a concept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infusion.concepts import checkpoints, custom_diffusion, embeddings, lora
from infusion.concepts.concept import Concept
from ldm.util.cli import UserError, naming
from ldm.weights.diffusers_layout import open_checkpoint
from ldm.weights.recognise import BASE, recognise

READERS = {  # kind of file -> what reads it
    "custom diffusion": custom_diffusion,
    "lora": lora,
    "textual inversion": embeddings,
    BASE: checkpoints,
}
IN_FOLDERS = [
    f"{stem}{ending}"
    for stem in ("pytorch_lora_weights", "adapter_model", "pytorch_custom_diffusion_weights", "learned_embeds")
    for ending in (".safetensors", ".bin")
]


def load(path: str | Path, said: Mapping[str, Any]) -> Concept:
    """The concept in a file or a folder of another tool.

    Args:
        said: what the file does not say or says otherwise, see `Concept.load`.

    Raises:
        ValueError: nothing reads it, or it has something that is not read; the message names the file.
    """
    path = Path(path)
    path = next((path / name for name in IN_FOLDERS if (path / name).is_file()), path)
    with open_checkpoint(path) as file, naming(str(path)):
        kind = recognise(file)
        if kind.name not in READERS:
            raise UserError(f"no concept file; it looks like {kind.says}")
        return READERS[kind.name].load(file, said)


def summary(path: str | Path) -> dict[str, Any]:
    """What a file is as a concept, as values for JSON; `refused` says why it is none."""
    try:
        concept = load(path, {})
    except UserError as error:
        return {"refused": str(error)}
    said = ("method", "architecture", "superclass", "noun", "base_hash", "steps", "numbers")
    return {name: getattr(concept, name) for name in said} | {"tensors": len(concept.tensors)}
