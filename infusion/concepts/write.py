"""Concepts in the files of other tools: sd-scripts (kohya), diffusers, A1111, and merged into whole models.

LoRA, Textual Inversion, Custom Diffusion and DreamBooth have their equals there; what Infusion and Perfusion do to an
attention has none, nor have the words of P+ or the timed ranks of T-LoRA.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from infusion.concepts.concept import Concept
from infusion.concepts.places import VERSIONS, encoders, modules, skeleton
from infusion.deltas import LowRank, in_model, merge
from infusion.methods import method_of
from infusion.methods.base import TOKENS
from ldm.pipeline import StableDiffusion
from ldm.util import files
from ldm.util.cli import UserError
from ldm.weights import recognise
from ldm.weights.checkpoint import save
from ldm.weights.checkpoint import write as write_tensors
from ldm.weights.export import export_diffusers

WHOLE_MODELS = ("folder", "checkpoint")
EQUALS = {  # method -> the layouts that have what it learns
    "lora": ("kohya", "a1111", "diffusers", *WHOLE_MODELS),
    "textual_inversion": ("kohya", "a1111", "diffusers"),
    "custom_diffusion": ("diffusers",),
    "dreambooth": WHOLE_MODELS,
}
WEIGHTS = "pytorch_custom_diffusion_weights.bin"
PARTS = {"unet": "unet", "te": "text_encoder", "te2": "text_encoder_2"}  # as diffusers calls them
BUNDLED = {"emb_params": "string_to_param.*"}  # what a learned word is called beside a LoRA
DOCS = "docs/files.md says what opens where"
CARD = """---
{front}---

# {concept.superclass} ({concept.method})

{description}

- Trigger: `{noun}`
- Method: {concept.method}; {concept.numbers:,} parameters
- Training: {concept.steps} steps, learning rate {concept.learning_rate:g}
- Base model: {concept.architecture}{digest}
"""


def check_layout(concept: Concept, layout: str) -> None:
    """Raises UserError where a layout has nothing that equals the concept."""
    method, equals = concept.method, EQUALS.get(concept.method, ())
    if method == "custom_diffusion" and len(encoders(skeleton(concept.architecture))) > 1:
        equals = ()
    if method == "lora" and TOKENS in concept.tensors:
        equals = ("kohya", "a1111")
    if layout not in equals:
        others = f"the layout {layout}; it has in {', '.join(equals)}" if equals else "files of other tools"
        raise UserError(f"what {method} learned of {concept.architecture} has no exact equal in {others} ({DOCS})")


def needs_base(concept: Concept, layout: str) -> bool:
    return layout in WHOLE_MODELS or concept.method == "custom_diffusion"


def default_name(concept: Concept, ending: str = ".safetensors") -> str:
    """`<superclass>-<method>-<steps>`, as a file's name."""
    word = re.sub(r"[^\w-]+", "_", concept.superclass).strip("_")[:80] or "concept"
    return f"{word}-{concept.method}-{concept.steps}{ending}"


def write(
    concept: Concept,
    path: Path,
    layout: str,
    said: Mapping[str, str],
    sd: StableDiffusion | None = None,
    half: bool = False,
) -> None:
    """Write a file, or the folder of one, that is not there yet.

    Args:
        concept: which has an equal in the layout (`check_layout`).
        said: further ModelSpec metadata, see `spec`.
        sd: the base model, where `needs_base`; it is another one afterwards.
        half: float16 in place of float32.
    """
    dtype = torch.float16 if half else torch.float32
    if layout in WHOLE_MODELS:
        _merge(concept, sd)
        if layout == "folder":
            export_diffusers(sd, path, dtype)
        else:
            save(path, dict(sd.named_children()), sd.architecture, dtype)
    elif concept.method == "custom_diffusion":
        _custom_diffusion(concept, path, sd, dtype)
    else:
        tensors = _words(concept, layout) if concept.method == "textual_inversion" else _low_rank(concept, layout)
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        metadata = spec(concept, said, tensors) | (_ss(concept) if concept.method == "lora" else {})
        metadata["modelspec.usage_hint"] = f"Write {_trigger(concept)} in the prompt"
        write_tensors(path, tensors, metadata)


def spec(concept: Concept, said: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A concept's metadata with all that ModelSpec 1.0.1 has for it.

    Args:
        said: author, license, tags, description, thumbnail (a data URL), by these names.
        tensors: of the file, whose hash is that of their bytes in the order of their names.
    """
    digest, size = hashlib.sha256(), recognise.backbones()[concept.architecture]["params"]["image_size"]
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    kind = "v" if recognise.prediction_type(concept.architecture) == "v_prediction" else "epsilon"
    return concept.metadata() | {
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": kind,
        "modelspec.hash_sha256": f"0x{digest.hexdigest()}",
        **{f"modelspec.{name}": text for name, text in said.items()},
    }


def card(concept: Concept, said: Mapping[str, str]) -> str:
    """A model card, as Hugging Face's hub reads it."""
    front = {
        "license": said.get("license"),
        "tags": [tag.strip() for tag in said.get("tags", "").split(",") if tag.strip()] or [concept.method],
        "instance_prompt": _trigger(concept),
        "author": said.get("author"),
    }
    return CARD.format(
        front="".join(f"{name}: {json.dumps(value)}\n" for name, value in front.items() if value),
        description=said.get("description", f"A concept of {concept.architecture}, learned by {concept.method}."),
        noun=_trigger(concept),
        digest=f", SHA-256 `{concept.base_hash}`" if concept.base_hash else "",
        concept=concept,
    )


def _token(concept: Concept) -> str:
    """The word that diffusers and A1111 add to their vocabulary."""
    return f"<{re.sub(r'[^0-9A-Za-z]+', '-', concept.superclass).strip('-').lower() or 'new1'}>"


def _trigger(concept: Concept) -> str:
    """What stands for the concept in the prompts of other tools."""
    return _token(concept) if concept.method == "textual_inversion" else concept.noun


def _merge(concept: Concept, sd: StableDiffusion) -> None:
    changes = method_of(concept).differences(concept.tensors)
    merge(sd, {in_model(name): [edit] for name, edit in changes.items()})


def _low_rank(concept: Concept, layout: str) -> dict[str, Tensor]:
    """The tensors of a LoRA file: sd-scripts' names and α, or PEFT's, where B has the scale in it."""
    sd, found = skeleton(concept.architecture), {}
    edits = method_of(concept).differences(concept.tensors)
    for name, edit, part, theirs, ours in _changed(sd, edits):
        start = _start(part, theirs, ours, layout == "diffusers", len(encoders(sd)) > 1)
        if not isinstance(edit, LowRank):
            if layout == "diffusers" or not hasattr(edit, "difference"):
                raise UserError(f"the change of {name} is not of low rank, for which {layout} has no place ({DOCS})")
            found[f"{start}.diff{'_b' if name.endswith('.bias') else ''}"] = edit.difference.detach()
            continue
        down, up = edit.down.detach(), edit.up.detach()
        up = up.reshape(*up.shape[:2], *(1,) * (down.ndim - 2))
        if layout == "diffusers":
            found |= {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up * edit.scale}
        else:
            alpha = torch.tensor(edit.scale * len(down))
            found |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up, f"{start}.alpha": alpha}
    if TOKENS in concept.tensors:
        for name, vectors in _words(concept, layout).items():
            found[f"bundle_emb.{_token(concept)[1:-1]}.{BUNDLED.get(name, name)}"] = vectors
    return found


def _changed(sd: StableDiffusion, edits: Mapping) -> Iterator[tuple]:
    """Tensor, its edit, and part and names of its module; of a tensor of several modules, each one's share."""
    left = set(edits)
    for ending in (".weight", ".bias"):
        for place, part, theirs, ours in modules(sd, ending):
            if (edit := edits.get(place.tensor)) is None:
                continue
            left.discard(place.tensor)
            if place.parts > 1 and isinstance(edit, LowRank):
                up = edit.up.chunk(place.parts)[place.part].detach()
                used = up.any(0)
                if not used.any():
                    continue
                scale = edit.scale * int(used.sum())
                edit = LowRank(edit.down.detach()[used], up[:, used], scale)
            yield place.tensor, edit, part, theirs, ours
    if left:
        raise UserError(f"the change of {sorted(left)[0]} has no name in other tools ({DOCS})")


def _start(part: str, theirs: str, ours: str, diffusers: bool, two: bool) -> str:
    """How the names of a module's change begin."""
    theirs = theirs if part == "unet" else f"text_model.{theirs}"
    if diffusers:
        return f"{PARTS[part]}.{theirs}"
    path = ours if two and part == "unet" else theirs  # of SDXL's UNet sd-scripts has LDM's names
    kind = "te1" if two and part == "te" else part
    return f"lora_{kind}_{path.replace('.', '_')}"


def _words(concept: Concept, layout: str) -> dict[str, Tensor]:
    vectors = concept.tensors[TOKENS]
    own = [module.width for _, module in encoders(skeleton(concept.architecture)).values()]
    if len(own) > 1:
        return dict(zip(("clip_l", "clip_g"), vectors.split(own, dim=1), strict=True))
    return {_token(concept): vectors} if layout == "diffusers" else {"emb_params": vectors}


def _custom_diffusion(concept: Concept, folder: Path, sd: StableDiffusion, dtype: torch.dtype) -> None:
    """A folder with the weights of all cross-attentions, and the word.

    The other attentions have empty entries, without which diffusers' `load_attn_procs` refuses the file.
    """
    _merge(concept, sd)
    state, found = sd.unet.state_dict(), {}
    more = any(".to_q." in name or ".to_out." in name for name in concept.tensors)
    for ending in (".weight", ".bias"):
        for place, part, theirs, _ in modules(sd, ending):
            layer, _, own = theirs.removesuffix(".0").rpartition(".")
            if part == "unet" and layer.endswith("attn1"):
                found[f"{layer}.processor"] = {}
            elif part == "unet" and layer.endswith("attn2") and (more or own in ("to_k", "to_v")):
                inner = ".0" if own == "to_out" else ""
                tensor = state[place.tensor].to(dtype).clone()
                found[f"{layer}.processor.{own}_custom_diffusion{inner}{ending}"] = tensor
    with files.replacing(folder) as partial:
        partial.mkdir()
        torch.save(found, partial / WEIGHTS)
        if TOKENS in concept.tensors:
            torch.save({"<new1>": concept.tensors[TOKENS].squeeze(0).to(dtype)}, partial / "<new1>.bin")


def _ss(concept: Concept) -> dict[str, str]:
    """What sd-scripts says of a LoRA."""
    version = next((theirs for theirs, ours in VERSIONS.items() if ours == concept.architecture), concept.architecture)
    return {
        "ss_base_model_version": version,
        "ss_v2": str("_v2" in version),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(concept.options.get("rank", "")),
        "ss_network_alpha": str(concept.options.get("alpha", "")),
        "ss_output_name": default_name(concept, ""),
        **{f"ss_{name}": str(getattr(concept, name)) for name in ("steps", "seed", "learning_rate")},
    }
