"""Infusion concepts in ComfyUI. This folder is complete by itself: put it into `custom_nodes/` (docs/comfyui.md).

Load Infusion Concept reads a file and gives it a token. Infusion Text Encode encodes a prompt, with the concept's noun
in place of the token, and leaves with the conditioning where concepts are and what they add. Apply Infusion makes the
model heed that: it appends a customised chunk to the batch for each such conditioning, gives it in every
cross-attention the foundation chunk's output and `(A_F g) r` (README, Method), and puts its prediction in place of the
foundation's. Conditioning without a concept is drawn by the model as it is.
"""

import json
import math
import os
import re
import zlib
from bisect import bisect_right
from functools import partial
from itertools import accumulate
from weakref import WeakKeyDictionary

import folder_paths
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io
from safetensors import safe_open

KEY, CALL = "infusion", "infusion_call"  # of conditioning by uuid, and of one call, in what a model hands down
LAYER = re.compile(r"(input|middle|output)_blocks?\.(\d+)\.(?:\d+\.)?transformer_blocks\.(\d+)\.attn2$")
WIDTHS = {"sd15": 768, "sd21": 1024, "sd21_768": 1024, "sdxl": 2048}  # of the text encodings, by base model
VOWEL = re.compile(r"(?!eu|ewe|one\b|u(ni|se|te|ku))[aeiou]|hour|heir|hono|hones", re.IGNORECASE)  # as it is spoken
folder_paths.add_model_folder_path("infusion", os.path.join(folder_paths.models_dir, "infusion"))
Infusion = io.Custom("INFUSION")


class LoadInfusionConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        files = [name for name in folder_paths.get_filename_list("infusion") if name.endswith(".safetensors")]
        return io.Schema(
            node_id="LoadInfusionConcept",
            display_name="Load Infusion Concept",
            category="infusion",
            description="A concept, and the token that stands for it in prompts.",
            inputs=[
                io.Combo.Input("concept", options=files, tooltip="a file in models/infusion"),
                io.String.Input("token", default="<rex>", tooltip="stands for the concept in prompts"),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.05),
                io.Float.Input(
                    "beta", default=0.7, min=-10.0, max=10.0, step=0.01, tooltip="where the gate half opens"
                ),
                io.Float.Input("tau", default=0.15, min=0.01, max=10.0, step=0.01, tooltip="the gate's temperature"),
                io.Combo.Input("gate", options=["as trained", "sigmoid", "hard", "global"]),
                Infusion.Input("others", optional=True, tooltip="concepts to have beside this one"),
            ],
            outputs=[Infusion.Output("concepts")],
        )

    @classmethod
    def execute(cls, concept, token, strength, beta, tau, gate, others=()):
        token = token.strip()
        if not token or any(token == other["token"] for other in others):
            raise ValueError(f"token: {token!r} is empty, or another concept's; choose another, such as <my-dog>")
        loaded = read_concept(folder_paths.get_full_path_or_raise("infusion", concept))
        chosen = {"token": token, "strength": strength, "beta": beta, "tau": tau}
        return io.NodeOutput([*others, loaded | chosen | ({} if gate == "as trained" else {"gate": gate})])


class InfusionTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="InfusionTextEncode",
            display_name="Infusion Text Encode",
            category="infusion",
            description="CLIP Text Encode, with concepts in the prompt. Draw with a model behind Apply Infusion.",
            inputs=[
                io.Clip.Input("clip"),
                Infusion.Input("concepts"),
                io.String.Input("text", multiline=True, dynamic_prompts=True, default="a photo of a <rex>"),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, clip, concepts, text):
        masks = [places(clip, text, concept, concepts) for concept in concepts]
        named = [(concept, mask) for concept, mask in zip(concepts, masks, strict=True) if mask.any()]
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(fill(text, concepts)))
        for encodings, extra in conditioning if named else ():
            gates = []
            for concept, mask in named:
                if WIDTHS.get(concept["base"], encodings.shape[-1]) != encodings.shape[-1]:
                    raise ValueError(f"the concept {concept['token']} is of {concept['base']}, and this CLIP is not")
                gates.append(gate_of(concept, encodings[0].float(), mask, target_input(clip, concept)))
            extra[KEY] = torch.stack(gates), [concept["residuals"] for concept, _ in named]  # (K, L), and by layer
        return io.NodeOutput(conditioning)


class ApplyInfusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ApplyInfusion",
            display_name="Apply Infusion",
            category="infusion",
            description="Makes a model heed the concepts in its conditioning. Put it behind IPAdapter and the like.",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model):
        model = model.clone()
        replaced = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
        found = ((LAYER.search(name), m) for name, m in model.model.diffusion_model.named_modules())
        widths = {key_of(layer): attention.to_q.out_features for layer, attention in found if layer}
        for key in widths:
            edited = EditedAttention(key, replaced.get(key, replaced.get(key[:2], attend)))
            model.set_model_attn2_replace(edited, *key)
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, partial(collect, widths))
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, stack)
        model.add_object_patch("memory_usage_factor", 1.5 * model.model.memory_usage_factor)  # three rows for two
        return io.NodeOutput(model)


class InfusionExtension(ComfyExtension):
    async def get_node_list(self):
        return [LoadInfusionConcept, InfusionTextEncode, ApplyInfusion]


async def comfy_entrypoint():
    return InfusionExtension()


class EditedAttention:
    """In place of a cross-attention, up to its last matrix: what was there before, and customised chunks behind it."""

    def __init__(self, key, before):
        self.key, self.before = key, before

    def __call__(self, q, k, v, options):
        """Projected (B, N, C), (B, L, C), (B, L, C) -> (B, N, C)."""
        if CALL not in options:
            return self.before(q, k, v, options)
        size, chunks, own = options[CALL]
        first, heads = size * len(own["uuids"]), options["n_heads"]
        out = self.before(q[:first], k[:first], v[:first], options | own)
        parts = [out]
        for index, gates, residuals in chunks:
            rows, count = slice(index * size, (index + 1) * size), len(residuals)
            layer = [each.get(self.key, torch.zeros(q.shape[-1])) for each in residuals]
            layer = torch.stack(layer).to(q).unflatten(-1, (heads, -1))  # (K, H, D)
            values = F.pad(gates, (0, k.shape[1] - gates.shape[1], 0, max(0, layer.shape[-1] - count))).mT  # (L, D)
            values = values.to(q).repeat(1, heads).expand(size, -1, -1)
            mass = attend(q[rows], k[rows], values, options).unflatten(-1, (heads, -1))[..., :count]  # (b, N, H, K)
            parts.append(out[rows] + torch.einsum("bnhk,khd->bnhd", mass, layer).flatten(2))
        return torch.cat(parts)


def attend(q, k, v, options):
    """As ComfyUI's own cross-attention calls it."""
    precision = options.get("attn_precision")
    return optimized_attention(q, k, v, options["n_heads"], attn_precision=precision, transformer_options=options)


def collect(widths, executor, model, conds, x, timestep, model_options):
    """Around the model's conditioning: what the concepts in it say, by the uuid under which it comes to a batch."""
    found = {}
    for cond in (cond for each in conds for cond in each or () if KEY in cond):
        gates, residuals = cond[KEY]
        for key, residual in ((key, r) for each in residuals for key, r in each.items()):
            if widths.get(key) != len(residual):
                raise ValueError(f"a concept is of another model: this one has no layer {key} of width {len(residual)}")
        behind = cond["cross_attn"].shape[1] - gates.shape[1]  # of a prompt that ConditioningConcat put there
        found[cond["uuid"]] = F.pad(gates, (0, behind)), residuals
    options = model_options.get("transformer_options", {})
    return executor(model, conds, x, timestep, model_options | {"transformer_options": options | {KEY: found}})


def stack(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **others):
    """Around a call of the model: a chunk more for each with concepts, and its prediction in that one's place."""
    options = transformer_options or {}
    found, uuids = options.get(KEY, {}), options.get("uuids", [])
    indices = [index for index, uuid in enumerate(uuids) if uuid in found]
    if not indices:
        return executor(x, t, c_concat, c_crossattn, control, options, **others)
    size, length = len(x) // len(uuids), c_crossattn.shape[1]
    rows = torch.cat([torch.arange(index * size, (index + 1) * size, device=x.device) for index in indices])

    def more(value):
        if isinstance(value, torch.Tensor):
            return torch.cat([value, value[rows.to(value.device)]]) if value.dim() and len(value) == len(x) else value
        if isinstance(value, dict):
            return {name: more(part) for name, part in value.items()}
        return [more(part) for part in value] if isinstance(value, list) else value

    chunks = []
    for index in indices:
        gates, residuals = found[uuids[index]]
        chunks.append((index, gates.repeat(1, length // gates.shape[1]), residuals))  # as the text is, beside a longer
    own = {name: options[name] for name in ("uuids", "cond_or_uncond")}
    stacked = {name: [*values, *(values[index] for index in indices)] for name, values in own.items()}
    options = options | stacked | {CALL: (size, chunks, own)}
    out = executor(more(x), more(t), more(c_concat), more(c_crossattn), more(control), options, **more(others))
    return out[: len(x)].index_copy(0, rows, out[len(x) :])


def key_of(layer):
    """ComfyUI's key of a layer: kind of block, its number (0 in the middle), transformer in it."""
    kind, number, index = layer.groups()
    return kind, 0 if kind == "middle" else int(number), int(index)


def fill(text, concepts, instead=None):
    """The text with a noun for each token; longer tokens first, since one may begin another."""
    for concept in sorted(concepts, key=lambda concept: -len(concept["token"])):
        text = text.replace(concept["token"], (instead or {}).get(concept["token"], concept["noun"]))
    return text


def ids_of(clip, text, **options):
    """Ids of all chunks, and which are of words; of two encoders, of the first. Embeddings have the id -1."""
    tokens = clip.tokenize(text, return_word_ids=True, **options)
    chunks = tokens["l"] if "l" in tokens else next(iter(tokens.values()))
    flat = [token for chunk in chunks for token in chunk]
    return [id if isinstance(id, int) else -1 for id, *_ in flat], [word != 0 for *_, word in flat]


def places(clip, text, concept, concepts, **options):
    """Where a concept's noun is, bool (L,): where ids change when another word of as many tokens stands there."""
    ids, words = ids_of(clip, concept["noun"], disable_weights=True)
    noun = [id for id, word in zip(ids, words, strict=True) if word]
    other = " ".join(["zebra" if "zebra" not in concept["noun"] else "tulip"] * len(noun))
    here, _ = ids_of(clip, fill(text, concepts), **options)
    there, _ = ids_of(clip, fill(text, concepts, {concept["token"]: other}), **options)
    changed = [a for a, b in zip(here, there, strict=False) if a != b]
    if len(here) != len(there) or changed != noun * (len(changed) // len(noun)):
        raise ValueError(f"{concept['token']} is glued to its neighbours in {text!r}: put spaces around it")
    return torch.tensor([a != b for a, b in zip(here, there, strict=True)])


def target_input(clip, concept):
    """i*, (D,): the mean encoding of the noun over the training prompts."""
    if clip not in concept["targets"]:
        means, marked = [], concept | {"token": "{}"}
        for template in concept["templates"]:
            mask = places(clip, template, marked, [marked], disable_weights=True)
            tokens = clip.tokenize(fill(template, [marked]), disable_weights=True)
            means.append(clip.encode_from_tokens(tokens)[0][mask].float().mean(0))
        concept["targets"][clip] = torch.stack(means).mean(0)
    return concept["targets"][clip]


def gate_of(concept, encodings, mask, target):
    """`σ((e i* / E − β) / τ)` at each token times the strength, (L,)."""
    opened = torch.sigmoid((encodings @ target / (target @ target) - concept["beta"]) / concept["tau"])
    gates = {"sigmoid": opened * mask, "hard": mask.float(), "global": opened}
    return gates[concept["gate"]] * concept["strength"]


def read_concept(path):
    """A concept file of any form (docs/concept-file.md); raises ValueError for any other."""
    with safe_open(path, "pt") as file:
        said = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if said.get("format") != "infusion-concept" or int(said["format_version"]) > 3:
        raise ValueError(f"{path}: no concept file that these nodes read")
    trained = {name: said[name] for name in ("method", "attention", "covariance")}
    if trained != {"method": "infusion", "attention": "foundation", "covariance": "identity"}:
        raise ValueError(f"{path}: these nodes are for the method infusion without a covariance; it has {trained}")
    if said.get("form") == "compact":
        tensors = read_compact(**{name: tensor.numpy().tobytes() for name, tensor in tensors.items()})
    layers = {name: LAYER.search(name) for name in tensors}
    if not all(layers.values()) or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{path}: it has tensors that are no layer's, or not finite")
    noun = json.loads(said["trained_words"])[0]
    article = re.compile(r"(?<!\w)([Aa])n?(\s+)(?=\{\d*\})")
    n = "n" if VOWEL.match(noun) else ""
    return {
        "noun": noun,
        "templates": [
            re.sub(r"\{\d*\}", "{}", article.sub(rf"\1{n}\2", text)) for text in json.loads(said["templates"])
        ],
        "gate": said["gate"],
        "base": said["base_architecture"],
        "residuals": {key_of(layer): tensors[name].float() for name, layer in layers.items()},
        "targets": WeakKeyDictionary(),  # by CLIP
    }


def read_compact(layers, numbers):
    """The tensors of a compact file, from its two streams."""
    description = json.loads(zlib.decompress(layers))
    tensors, start = {}, 0
    for name, (shape, peak, spread, length) in description["layers"].items():
        if not (0 <= peak < 2**13 and 0 <= math.prod(shape) <= 50_000):
            raise ValueError(f"damaged: {name} is out of range")
        weights = [1 + (spread**2 << 16) // (spread + q * q) ** 2 for q in range(-peak, peak + 1)]
        below = [0, *accumulate(weights)]
        state = int.from_bytes(numbers[start : start + length], "little")
        start, quantised = start + length, []
        for _ in range(math.prod(shape)):
            turns, rest = divmod(state, below[-1])
            index = bisect_right(below, rest) - 1
            state = weights[index] * turns + rest - below[index]
            quantised.append(index - peak)
        tensors[name] = torch.tensor(quantised, dtype=torch.float64).mul(description["step"]).float().reshape(shape)
    return tensors
