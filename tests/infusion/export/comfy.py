"""What the nodes call of ComfyUI, small: its modules, a CLIP, a model and its sampling, over our own models.

Written after ComfyUI 0.3.64 (commit a125cd84): `comfy/samplers.py` (`_calc_cond_batch`, `convert_cond`, conditions
tiled to one length), `comfy/model_base.py` (`apply_model`), `comfy/ldm/modules/attention.py` (`BasicTransformerBlock`),
`comfy/sd1_clip.py` (chunks, weights). docs/comfyui.md says how the nodes were tried in ComfyUI itself.
"""

import math
import re
import uuid
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import Context, CrossAttention
from ldm.pipeline import StableDiffusion

CALC_COND_BATCH, APPLY_MODEL = "calc_cond_batch", "apply_model"
WEIGHTED = re.compile(r"\(([^():]*):([\d.]+)\)|([^()]+)")


def optimized_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, attn_precision: Any = None,
                        transformer_options: Any = None) -> Tensor:  # fmt: skip
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def comfy_modules(folder: Path) -> dict[str, ModuleType]:
    """The modules that the nodes import; concepts lie in `folder`/infusion."""

    def module(name: str, **content: Any) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(content)
        return made

    def noted(*args: Any, **kwargs: Any) -> tuple:
        return args, kwargs

    inputs = SimpleNamespace(Input=noted, Output=noted)
    kinds = dict.fromkeys(("Combo", "String", "Float", "Clip", "Model", "Conditioning"), inputs)
    io = SimpleNamespace(**kinds, ComfyNode=object, Schema=noted, NodeOutput=noted, Custom=lambda name: inputs)
    paths: dict[str, str] = {}
    wrappers = SimpleNamespace(CALC_COND_BATCH=CALC_COND_BATCH, APPLY_MODEL=APPLY_MODEL)
    return {
        "folder_paths": module(
            "folder_paths",
            models_dir=str(folder),
            add_model_folder_path=paths.__setitem__,
            get_filename_list=lambda kind: sorted(path.name for path in Path(paths[kind]).iterdir()),
            get_full_path_or_raise=lambda kind, name: str(Path(paths[kind]) / name),
        ),
        "comfy": module("comfy"),
        "comfy.ldm": module("comfy.ldm"),
        "comfy.ldm.modules": module("comfy.ldm.modules"),
        "comfy.ldm.modules.attention": module("attention", optimized_attention=optimized_attention),
        "comfy.patcher_extension": module("patcher_extension", WrappersMP=wrappers),
        "comfy_api": module("comfy_api"),
        "comfy_api.latest": module("latest", ComfyExtension=object, io=io),
    }


class Clip:
    """ComfyUI's CLIP: chunks of (id, weight, number of its word), weights as a share of the way from "" ."""

    def __init__(self, sd: StableDiffusion) -> None:
        self.text, self.tokenizer = sd.text, sd.text.tokenizer

    def tokenize(self, text: str, return_word_ids: bool = False, disable_weights: bool = False) -> dict[str, list]:
        tokenizer = self.tokenizer
        plain = [(text, 1.0)] if text else []
        found = ((m[1], float(m[2])) if m[2] else (m[3], 1.0) for m in WEIGHTED.finditer(text))
        segments = plain if disable_weights else found
        flat = [(i, weight, n) for n, (words, weight) in enumerate(segments, 1) for i in tokenizer.encode(words)]
        room, end = tokenizer.context_length - 2, (tokenizer.eos, 1.0, 0)
        chunks = []
        for start in range(0, max(len(flat), 1), room):
            chunk = [(tokenizer.bos, 1.0, 0), *flat[start : start + room], end]
            chunks.append(chunk + [(tokenizer.pad, 1.0, 0)] * (room + 2 - len(chunk)))
        return {"l": chunks if return_word_ids else [[token[:2] for token in chunk] for chunk in chunks]}

    def encode_from_tokens(self, tokens: dict[str, list]) -> Tensor:
        empty = self.text([""])
        ids = torch.tensor([[token[0] for token in chunk] for chunk in tokens["l"]])
        weights = torch.tensor([[token[1] for token in chunk] for chunk in tokens["l"]])[..., None]
        encodings = self.text.encode_tokens(ids)
        return torch.where(weights == 1, encodings, (encodings - empty) * weights + empty).flatten(0, 1)[None]

    def encode_from_tokens_scheduled(self, tokens: dict[str, list]) -> list:
        return [[self.encode_from_tokens(tokens), {"pooled_output": None}]]


@dataclass(frozen=True, eq=False)
class Handed(Context):
    options: dict


class Base:
    """ComfyUI's BaseModel, without its parametrisation: it gives what the UNet predicts."""

    def __init__(self, unet: nn.Module) -> None:
        self.diffusion_model, self.memory_usage_factor = unet, 1.0
        numbers = {"input": iter(range(99)), "output": iter(range(99))}
        for kind in numbers:
            for block in getattr(unet, f"{kind}_blocks"):
                _hook(block, (kind, next(numbers[kind])))
        _hook(unet.middle_block, ("middle", 0))

    def apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        wrappers = [w for each in transformer_options["wrappers"].get(APPLY_MODEL, {}).values() for w in each]
        executor = chained(self._apply_model, wrappers)
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        rows = {len(x), len(t), len(c_crossattn), *map(len, (control or {}).get("middle", ()))}
        assert len(rows) == 1 and len(x) % len(transformer_options["uuids"]) == 0
        out = self.diffusion_model(x, t, Handed(c_crossattn, transformer_options))
        return out + (control["middle"][0] if control else 0)  # a stand-in's control


def _hook(block: nn.Module, key: tuple[str, int]) -> None:
    layers = [m for m in block.modules() if isinstance(m, CrossAttention)]
    for number, layer in enumerate(layers[1::2]):  # attn1 and attn2 by turns
        layer.forward = partial(attn2, layer, (*key, number))


def attn2(layer: CrossAttention, key: tuple[str, int, int], x: Tensor, context: Handed) -> Tensor:
    """The part of BasicTransformerBlock.forward."""
    options = {name: value for name, value in context.options.items() if name not in ("patches", "patches_replace")}
    options |= {"n_heads": layer.heads, "dim_head": layer.dim_head, "attn_precision": None, "block": key[:2]}
    replaced = context.options.get("patches_replace", {}).get("attn2", {})
    q, k, v = layer.to_q(x), layer.to_k(context.text), layer.to_v(context.text)
    patch = replaced.get(key, replaced.get(key[:2]))
    if patch is None:
        out = optimized_attention(q, k, v, layer.heads, transformer_options=context.options)
    else:
        out = patch(q, k, v, options)
    return layer.to_out(out)


@dataclass
class Patcher:
    """ComfyUI's ModelPatcher."""

    model: Base
    model_options: dict = field(default_factory=lambda: {"transformer_options": {"wrappers": {}}})
    object_patches: dict = field(default_factory=dict)

    def clone(self) -> "Patcher":
        made, options = copy(self), self.model_options["transformer_options"]
        wrappers = {kind: {key: list(w) for key, w in each.items()} for kind, each in options["wrappers"].items()}
        made.model_options = {"transformer_options": options | {"wrappers": wrappers}}
        made.object_patches = dict(self.object_patches)
        return made

    def set_model_attn2_replace(self, patch, block_name, number, transformer_index=None) -> None:
        options = self.model_options["transformer_options"]
        replaced = options.get("patches_replace", {})
        key = (block_name, number) if transformer_index is None else (block_name, number, transformer_index)
        options["patches_replace"] = replaced | {"attn2": replaced.get("attn2", {}) | {key: patch}}

    def add_wrapper_with_key(self, kind, key, wrapper) -> None:
        self.model_options["transformer_options"]["wrappers"].setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def add_object_patch(self, name, value) -> None:
        self.object_patches[name] = value


def chained(original, wrappers):
    """ComfyUI's WrapperExecutor: each wrapper gets what calls the next one."""
    return partial(wrappers[0], chained(original, wrappers[1:])) if wrappers else original


@torch.no_grad()
def predict(
    patcher: Patcher, conds: list[list], x: Tensor, timestep: int, control: Tensor | None = None
) -> list[Tensor]:
    """What a sampler gets for each list of conditioning (positive, negative): `calc_cond_batch`, all in one batch."""
    converted = [[entry[1] | {"cross_attn": entry[0], "uuid": uuid.uuid4()} for entry in each] for each in conds]
    wrappers = patcher.model_options["transformer_options"]["wrappers"].get(CALC_COND_BATCH, {})
    executor = chained(partial(_calc_cond_batch, control), [w for each in wrappers.values() for w in each])
    return executor(patcher.model, converted, x, torch.full((len(x),), timestep), patcher.model_options)


def _calc_cond_batch(control, model, conds, x, timestep, model_options):
    run = [(cond, index) for index, each in enumerate(conds) for cond in each][::-1]
    length = math.lcm(*(cond["cross_attn"].shape[1] for cond, _ in run))
    texts = [cond["cross_attn"].repeat(len(x), length // cond["cross_attn"].shape[1], 1) for cond, _ in run]
    options = dict(model_options["transformer_options"])
    options |= {"cond_or_uncond": [index for _, index in run], "uuids": [cond["uuid"] for cond, _ in run]}
    inputs = {"c_crossattn": torch.cat(texts), "transformer_options": options}
    if control is not None:
        inputs["control"] = {"input": [None], "middle": [control.repeat(len(run), 1, 1, 1)], "output": []}
    out = model.apply_model(x.repeat(len(run), 1, 1, 1), timestep.repeat(len(run)), **inputs).chunk(len(run))
    sums = [torch.zeros_like(x) for _ in conds]
    for (_, index), part in zip(run, out, strict=True):
        sums[index] += part
    return [total / len(each) for total, each in zip(sums, conds, strict=True)]
