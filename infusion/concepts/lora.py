"""LoRA files of other tools, as concepts of the method LoRA: sd-scripts, diffusers and PEFT, OneTrainer, cloneofsimo.

Every tensor has a place in the base model, or the file is refused. LoCon's, LoHa's and LoKr's changes (LyCORIS: Yeh et
al. 2023, arXiv 2309.14859) are read too; DoRA's are not, since they are no sum of W and something.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from infusion.concepts.concept import Concept
from infusion.concepts.embeddings import PLACEHOLDER, stacked
from infusion.concepts.places import as_mapping, find_architecture, find_place, history, key, places, skeleton
from infusion.deltas import ALPHA, DOWN, UP, in_model
from infusion.methods.base import TOKENS
from ldm.models.attention import BasicTransformerBlock
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError
from ldm.weights.files import TensorFile

PARTS = {  # how names begin -> the part of the model that they are of; the first one counts
    **{"lora_unet_": "unet", "lora_te1_": "te", "lora_te2_": "te2", "lora_te_": "te"},
    **{"unet.": "unet", "text_encoder.": "te", "text_encoder_2.": "te2", "clip_l.": "te", "clip_g.": "te2"},
    **{"base_model.model.text_model.": "te", "base_model.model.encoder.": "te", "base_model.model.": "unet"},
    **{"down_blocks.": "unet", "mid_block.": "unet", "up_blocks.": "unet"},
}
FACTORS = r"(?:lora|lora_linear_layer)[._](down|up|mid|A|B)(?:\.default)?\.weight"
ROLE = re.compile(rf"(.+)\.(?:{FACTORS}|(alpha|dora_scale|diff|diff_b|hada_\w+|lokr_\w+|lora_magnitude_vector.*))")
PEFT = {"A": "down", "B": "up"}
WORDS = re.compile(r"bundle_emb\.(.+)\.(clip_[lg]|string_to_param\.\*)|(<.+>)")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BLOCK = (*(f"attn1.{part}" for part in ATTENTION), "ff.net.0.proj", *(f"attn2.{part}" for part in ATTENTION))
NUMBERED = re.compile(r"(unet|text_encoder):(\d+):(up|down)")

Module = dict[str, Tensor]  # role, such as "down" -> tensor


def load(file: TensorFile, said: Mapping[str, Any]) -> Concept:
    """Raises ValueError for a tensor that has no place in the base model, or a kind of change that is not read."""
    modules: dict[str, Module] = {}
    words: dict[str, list[Tensor]] = {}
    for name in file.shapes:
        if match := NUMBERED.fullmatch(name):
            modules.setdefault(f"{match[1]}:{match[2]}", {})[match[3]] = file.read(name)
        elif match := WORDS.fullmatch(name):
            own = words.setdefault(match[1] or match[3], [])
            own.insert(0 if match[2] == "clip_l" else len(own), file.read(name))
        else:
            module, role = _split(name)
            roles = modules.setdefault(module, {})
            if role in roles:
                raise UserError(f"it has {role!r} of {module} twice, under names of different tools")
            roles[role] = file.read(name)
    architecture = find_architecture(file.metadata, said, _width(modules))
    sd = skeleton(architecture)
    if any(":" in module for module in modules):
        modules = _in_order(sd, modules)
    weights, biases = places(sd), places(sd, ".bias")
    adapter = _settings(file)
    changes: dict[str, dict[int, Module]] = {}
    tensors: dict[str, Tensor] = {}
    for module, roles in modules.items():
        if "diff_b" in roles:
            tensors[find_place(biases, module, architecture).tensor] = roles.pop("diff_b")
        if roles:
            place = find_place(weights, module, architecture)
            change = _low_rank(module, roles, _default_alpha(adapter, module))
            shape = sd.get_parameter(in_model(place.tensor)).shape
            parts = changes.setdefault(place.tensor, dict.fromkeys(range(place.parts)))
            if parts[place.part] is not None:
                raise UserError(f"changes {module!r} twice, under names of different tools")
            parts[place.part] = _shaped(module, change, shape, place.parts)
    for name, parts in changes.items():
        tensors |= _joined(name, [parts[i] for i in parts])
    token = placeholder = ""
    if words:
        token, tensors[TOKENS] = stacked(words)
        placeholder = PLACEHOLDER * len(tensors[TOKENS])
    ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith(DOWN)} or {1}
    alphas = {tensor.item() for name, tensor in tensors.items() if name.endswith(ALPHA)}
    if len(ranks) == len(alphas) == 1:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(ALPHA)}
    facts = history(file, said, token, placeholder)
    options = {"rank": max(ranks), "alpha": max(alphas, default=1.0), "identifier": ""}
    return Concept(tensors, architecture=architecture, method="lora", options=options, **facts)


def _split(name: str) -> tuple[str, str]:
    """The key of the module that a tensor changes, and the tensor's role in that."""
    match = ROLE.fullmatch(re.sub(r"\.processor\.(to_\w+?)_lora\.", r".\1.lora.", name))  # diffusers' names of 2023
    start = next((start for start in PARTS if name.startswith(start)), None)
    if not match or start is None:
        raise UserError(f"a LoRA with a tensor {name[:100]!r}, which is of no kind that is read")
    role = PEFT.get(match[2], match[2]) or match[3]
    if role == "dora_scale" or role.startswith(("lora_magnitude", "hada_t", "lokr_t")):
        kind = "a Tucker decomposition" if role.startswith(("hada", "lokr")) else "DoRA"
        raise UserError(f"{name[:100]} is of {kind}, which is not read: merge it into a checkpoint with its own tool")
    kept = start.removeprefix("base_model.model.") if start.startswith(("base", "down", "mid", "up")) else ""
    return key(PARTS[start], kept + match[1].removeprefix(start)), role


def _width(modules: Mapping[str, Module]) -> int | None:
    """Of the text that the base model's UNet takes: by its cross-attentions, else by the text encoders."""
    found: dict[str, int] = {}
    for module, roles in modules.items():
        if (down := roles.get("down")) is not None and down.ndim > 1:
            for end in ("attn2_to_k", "attn2_to_v", "unet:6"):  # the seventh of cloneofsimo's is an attn2.to_k
                found |= {"unet": down.shape[1]} if module.endswith(end) else {}
            if module.startswith(("te_", "te2_", "text_encoder:")) and module.endswith(("q_proj", "r:0")):
                found[module.split("_")[0]] = down.shape[1]
    texts = [width for part, width in found.items() if part != "unet"]
    return found.get("unet") or sum(texts) + 768 * (found.keys() == {"te2"}) or None


def _settings(file: TensorFile) -> dict[str, Any]:
    """PEFT's settings: diffusers has them in the metadata, PEFT itself in a file beside, without which α is unknown.

    Raises:
        ValueError: that file is missing, or the scale is more than α / r.
    """
    adapter = as_mapping(file.metadata.get("lora_adapter_metadata"))
    if any(name.startswith("base_model.model.") for name in file.shapes):
        beside = file.path.with_name("adapter_config.json")
        if not beside.is_file():
            raise UserError("a file of PEFT, whose α is in adapter_config.json: put that beside it")
        adapter = as_mapping(beside.read_text(encoding="utf-8", errors="replace"))
    for name, value in adapter.items():
        if value and name.endswith(("alpha_pattern", "use_rslora", "use_dora")):
            raise UserError(f"its {name} is not read: merge it into a checkpoint with its own tool")
    return adapter


def _default_alpha(adapter: Mapping[str, Any], module: str) -> float | None:
    """α of diffusers' and PEFT's metadata, which files without tensors for it may have."""
    part = {"unet": "unet", "te": "text_encoder", "te2": "text_encoder_2"}[module.split("_")[0]]
    alpha = adapter.get(f"{part}.lora_alpha", adapter.get("lora_alpha"))
    return float(alpha) if isinstance(alpha, int | float) else None


def _low_rank(module: str, roles: Module, alpha: float | None) -> Module:
    """A module's change as `down`, `up` and a scalar `alpha`, or as `diff`."""
    left = {role: tensor.float() for role, tensor in roles.items()}
    own = left.pop("alpha", None)
    if own is not None and own.numel() == 1 and own.item():  # sd-scripts takes 0 for none
        alpha = own.item()
    try:
        change = _change(left, alpha)
    except (KeyError, RuntimeError, IndexError) as error:
        what = str(error).splitlines()[0][:100]
        raise UserError(f"the change of {module} cannot be read: {what}") from error
    if left:
        raise UserError(f"the change of {module} has a tensor {next(iter(left))}, which is of no kind that is read")
    return change


def _change(left: Module, alpha: float | None) -> Module:
    """Takes out of a module's tensors what makes its change."""
    if "diff" in left:
        return {"diff": left.pop("diff")}
    if "hada_w1_a" in left:  # LoHa: the product, number by number, of two low-rank matrices
        rank = len(left["hada_w1_b"])
        one, two = (left.pop(f"hada_w{i}_a") @ left.pop(f"hada_w{i}_b").flatten(1) for i in (1, 2))
        return {"diff": one * two * ((alpha or rank) / rank)}
    if any(role.startswith("lokr") for role in left):  # a Kronecker product, of factors or of their factors
        ranks = [len(left[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in left]
        one, two = (
            left.pop(f"lokr_w{i}")
            if f"lokr_w{i}" in left
            else left.pop(f"lokr_w{i}_a") @ left.pop(f"lokr_w{i}_b").flatten(1)
            for i in (1, 2)
        )
        return {"diff": torch.kron(one, two.flatten(1)) * (alpha / ranks[0] if ranks and alpha else 1.0)}
    down, up, mid = left.pop("down"), left.pop("up"), left.pop("mid", None)
    if mid is not None:  # LoCon's three factors are two: the middle one is taken into the lower
        down = torch.einsum("mnhw,ni->mihw", mid, down.flatten(1))
    return {"down": down, "up": up, "alpha": torch.tensor(alpha or float(len(down)))}


def _shaped(module: str, roles: Module, shape: torch.Size, parts: int) -> Module:
    """A change with the shape of the module's weight: a linear layer is a 1 × 1 convolution."""
    found = {role: tuple(tensor.shape) for role, tensor in roles.items()}
    wanted = torch.Size((shape[0] // parts, *shape[1:]))
    if "diff" in roles and roles["diff"].numel() == wanted.numel() and len(roles["diff"]) == wanted[0]:
        return {"diff": roles["diff"].reshape(wanted)}
    if "diff" not in roles:
        down, up = roles["down"], roles["up"].flatten(1)
        if down[0].numel() == wanted[1:].numel() and up.shape == (wanted[0], len(down)):
            return roles | {"down": down.reshape(-1, *wanted[1:]), "up": up}
    raise UserError(f"the change of {module} is {found}, the weight {tuple(wanted)}")


def _joined(name: str, parts: Sequence[Module | None]) -> dict[str, Tensor]:
    """One tensor's change, of those of the parts below each other that it consists of.

    B of all is block-diagonal, so that the sum of the parts' changes is one low-rank change, exactly.
    """
    first = next(part for part in parts if part)
    if len(parts) == 1:
        if "diff" in first:
            return {name: first["diff"]}
        return {name + DOWN: first["down"], name + UP: first["up"], name + ALPHA: first["alpha"]}
    if any(part and "diff" in part for part in parts):
        raise UserError(f"the change of a part of {name} is not of low rank, which is not read")
    unchanged = torch.zeros(len(first["up"]), 0)
    up = torch.block_diag(*(p["alpha"] / len(p["down"]) * p["up"] if p else unchanged for p in parts))
    down = torch.cat([part["down"] for part in parts if part])
    return {name + DOWN: down, name + UP: up, name + ALPHA: torch.tensor(float(len(down)))}


def _in_order(sd: StableDiffusion, modules: Mapping[str, Module]) -> dict[str, Module]:
    """cloneofsimo's modules, which are numbered as diffusers of 2022 made them, under the keys of the others."""
    named = {}
    for part, paths in (("unet", _unet_order(sd)), ("text_encoder", _text_order(sd))):
        own = {int(name.split(":")[1]): roles for name, roles in modules.items() if name.startswith(f"{part}:")}
        if own and sorted(own) != list(range(len(paths := list(paths)))):
            raise UserError(f"has {len(own)} changes of the {part}, where {len(paths)} are wanted")
        named |= {paths[i]: roles for i, roles in own.items()}
    return named


def _unet_order(sd: StableDiffusion) -> Iterator[str]:
    """The way down, the way up, the middle; of each block attn1, the gate of its MLP, attn2."""
    for side in ("input_blocks", "output_blocks", "middle_block"):
        for path, block in getattr(sd.unet, side).named_modules(prefix=side):
            if isinstance(block, BasicTransformerBlock):
                yield from (key("unet", f"{path}.{layer}") for layer in BLOCK)


def _text_order(sd: StableDiffusion) -> Iterator[str]:
    """Of each layer keys, values, queries, output, as transformers' CLIPAttention has them."""
    layers = sum(name.startswith("te_encoder_layers_") and name.endswith("q_proj") for name in places(sd))
    for i in range(layers):
        yield from (key("te", f"encoder.layers.{i}.self_attn.{part}_proj") for part in ("k", "v", "q", "out"))
