"""Infusion concepts in pipelines of diffusers that have a UNet2DConditionModel: SD 1.5, 2.1 and SDXL, of any task.

    load_concept(pipe, "rex.safetensors", token="<rex>")
    pipe("a photo of <rex> on the beach")
    set_concepts(pipe, "<rex>", strength=0.8)
    unload(pipe)

The token reads as the concept's noun: a hook on the text encoder puts the noun's ids in its place, and marks the
encodings of such a prompt. A hook on the UNet recognises them, appends a customised row to the batch for each, and puts
its prediction in place of the foundation's. In a cross-attention, a customised row gets the foundation row's output and
`W_out (A_F g) r` (README, Method). All that belongs to one call of the UNet travels in place of its
`encoder_hidden_states`, so that calls in several threads do not meet.

Legend for shapes: R rows of a call, A of them with a concept, K concepts in the call, L text tokens, H heads, D head
width, C = H·D, N image tokens.
"""

import copy
import inspect
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from infusion.concepts.concept import Concept
from infusion.gate import Gate, fingerprint
from infusion.sampling.settings import BETA, TAU
from ldm.util.cli import UserError
from ldm.util.templates import filled_parts

BASES = {  # architecture -> width of its text encodings, and what its UNet predicts
    "sd15": (768, "epsilon"),
    "sd21": (1024, "epsilon"),
    "sd21_768": (1024, "v_prediction"),
    "sdxl": (2048, "epsilon"),
}
BITS, TAIL = 16, 32  # components of the first and the last token's encoding that make a marked row's key
MARKS = 100_000  # keys that are kept, about 13 for each prompt
PLACED = tuple(inspect.signature(UNet2DConditionModel.forward).parameters)[1:]  # which may be given by place
APPENDED = ("sample", "timestep", "class_labels", "timestep_cond", "attention_mask", "added_cond_kwargs",
            "down_block_additional_residuals", "mid_block_additional_residual",
            "down_intrablock_additional_residuals")  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A concept in a pipeline: residuals by diffusers' layer, (C,), and i*, (D,), once it is known."""

    residuals: Mapping[str, Tensor]
    gate: Gate
    strength: float
    inverse_covariance: Tensor | None
    target: Tensor | None = None


def load_concept(
    pipe: Any,
    concept: Concept | str | Path,
    token: str,
    *,
    strength: float = 1.0,
    beta: float = BETA,
    tau: float = TAU,
    gate: str | None = None,
    inverse_covariance: Tensor | None = None,
) -> None:
    """Give a pipeline a token for a concept. Prompts without the token are drawn as before, to the bit.

    Args:
        pipe: a pipeline with `tokenizer`, `text_encoder` (of SDXL also those with `_2`) and `unet`. Pipelines made of
            it by `from_pipe` have the concept too.
        concept: one that the method infusion learned, or its file.
        token: stands for the concept in prompts, such as "<rex>".
        strength, beta, tau, gate: as in `infusion.sampling.settings.Settings`; a gate None is the concept's own.
        inverse_covariance: C⁻¹, (D, D), of a concept that was trained with one.

    Raises:
        ValueError: a concept of another method or base model, a token that is a word already, or a value out of range.
    """
    concept = concept if isinstance(concept, Concept) else Concept.load(concept)
    residuals = _residuals(pipe, concept)
    if fingerprint(inverse_covariance) != concept.covariance:
        raise UserError(f"inverse_covariance: {concept.superclass!r} needs the one that it was trained with, or none")
    for tokenizer in filter(None, (pipe.tokenizer, getattr(pipe, "tokenizer_2", None))):
        if token.split() != [token] or len(tokenizer(token, add_special_tokens=False).input_ids) < 2:
            raise UserError(f"token: {token!r} is no new word; choose another, such as '<my-dog>'")
    loaded = Loaded(residuals, concept.gate.replace(gate, beta, tau), _finite(strength), inverse_covariance)
    (_adapter_of(pipe) or Adapter(pipe)).load(pipe, token, concept, loaded)


def set_concepts(
    pipe: Any,
    tokens: Sequence[str] | None = None,
    *,
    strength: float | None = None,
    beta: float | None = None,
    tau: float | None = None,
    gate: str | None = None,
) -> None:
    """Change how concepts are blended from the next call on; tokens None are all, a value None stays as it is.

    Raises:
        ValueError: a token of no loaded concept, or a value out of range.
    """
    adapter, named = _named(pipe, tokens)
    for token in named:
        was = adapter.loaded[token]
        factor = was.strength if strength is None else _finite(strength)
        adapter.loaded[token] = replace(was, gate=was.gate.replace(gate, beta, tau), strength=factor)
    adapter.calls = WeakTensorKeyDictionary()


def unload(pipe: Any, tokens: Sequence[str] | None = None) -> None:
    """Take concepts out, all of them with None. After the last one, the pipeline is as it was before the first.

    Raises:
        ValueError: a token of no loaded concept, or the tokenizer got other tokens since.
    """
    adapter, named = _named(pipe, tokens)
    adapter.drop(named)


def mark(pipe: Any, prompt_embeds: Tensor, prompts: Sequence[str]) -> Tensor:
    """Encodings (B, L, D) of B prompts, made by other means than the pipeline's, so that their concepts are drawn.

    Weighting words, as compel does, changes the marks, and a file of encodings has none. Encodings of long prompts are
    in chunks of the text encoder's length.
    """
    adapter, _ = _named(pipe, None)
    tokenizer, _ = adapter.tokenizers[0]
    text, length = prompt_embeds.clone(), adapter.length
    for row, prompt in zip(text, prompts, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        tokens = [token for _, token in fill_ids(ids, adapter.nouns[0])]
        for chunk, part in enumerate(row.split(length)):
            inner = tokens[chunk * (length - 2) :][: length - 2]
            adapter.mark([None, *inner, *[None] * (length - 1 - len(inner))], [part])
    return text


@dataclass(frozen=True, eq=False)
class Call:
    """What the cross-attentions of one call of the UNet get in place of the text.

    Attributes:
        text: (R, L, D), of the pipeline's own rows. rows: (A,), those that a customised row follows.
        gates: (A, K, L), times the strength. residuals: by layer, (K, C).
    """

    text: Tensor
    rows: Tensor
    gates: Tensor
    residuals: Mapping[str, Tensor]

    def append(self, value: Any) -> Any:
        """A value of R rows, or a collection of such, with a row for each customised one behind them."""
        if isinstance(value, Tensor):
            return torch.cat([value, value[self.rows]]) if value.dim() and len(value) == len(self.text) else value
        if isinstance(value, dict):  # image prompts join the text, which has R rows
            return {name: part if name == "image_embeds" else self.append(part) for name, part in value.items()}
        return type(value)(map(self.append, value)) if isinstance(value, list | tuple) else value


class Adapter:
    """The concepts of a UNet, with its hooks and those of the text encoders. There is one while there are concepts."""

    def __init__(self, pipe: Any) -> None:
        pairs = [(getattr(pipe, f"tokenizer{n}", None), getattr(pipe, f"text_encoder{n}", None)) for n in ("", "_2")]
        pairs = [(tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None]
        self.unet, self.length = pipe.unet, pairs[0][0].model_max_length
        self.tokenizers = [(tokenizer, copy.deepcopy(tokenizer)) for tokenizer, _ in pairs]  # and as it was
        self.nouns: list[dict[int, tuple[str, list[int]]]] = [{} for _ in pairs]  # id -> its token, the noun's ids
        self.words: dict[str, str] = {}  # token -> noun
        self.loaded: dict[str, Loaded] = {}
        self.marks: dict[bytes, tuple[Sequence[str | None], Tensor]] = {}  # key -> token at each place, what was there
        self.count, self.lock = 0, threading.Lock()
        self.calls = WeakTensorKeyDictionary()  # encodings -> what the UNet reads; None is themselves
        self.texts = WeakTensorKeyDictionary()  # ids that a text encoder reads -> token at each place of each row
        self.handles = [
            *(
                encoder.register_forward_pre_hook(partial(self.put_nouns, index), with_kwargs=True)
                for index, (_, encoder) in enumerate(pairs)
            ),
            pairs[0][1].register_forward_hook(self.mark_texts, with_kwargs=True),
            self.unet.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.unet.register_forward_hook(self.leave, with_kwargs=True),
        ]
        unet = _plain(self.unet)
        self.edited = [Edited(unet.get_submodule(name), name) for name in layer_names(unet).values()]

    @torch.no_grad()
    def load(self, pipe: Any, token: str, concept: Concept, loaded: Loaded) -> None:
        try:
            self.spell({token: concept.superclass})
            parts = [filled_parts(template, [concept.superclass]) for template in concept.templates]  # with its article
            prompts = ["".join(token if i % 2 else part for i, part in enumerate(each)) for each in parts]
            means = []
            for start in range(0, len(prompts), 16):
                text, marks = self.read(
                    pipe.encode_prompt(
                        prompt=prompts[start : start + 16], device=pipe._execution_device, num_images_per_prompt=1,
                        do_classifier_free_guidance=False,
                    )[0]
                )  # fmt: skip
                found = [[name == token for name in marks[row, 0]] for row in range(len(text))]
                weights = torch.tensor(found, device=text.device, dtype=torch.float32)  # (B, L)
                means.append(torch.einsum("bl,bld->bd", weights / weights.sum(1, keepdim=True), text.float()))
            self.spell({token: concept.noun})
            self.loaded[token] = replace(loaded, target=torch.cat(means).mean(0))
        finally:
            if token not in self.loaded:
                self.drop([token])

    def spell(self, words: Mapping[str, str]) -> None:
        """Put tokens into the tokenizers, in place, so that other pipelines have them too; each reads as its noun."""
        from transformers import AddedToken  # which the pipeline has its tokenizers from

        self.words |= words
        added = [AddedToken(token, normalized=False, single_word=token.isalnum()) for token in words]
        for (tokenizer, original), nouns in zip(self.tokenizers, self.nouns, strict=True):
            tokenizer.add_tokens(added)
            for token, noun in words.items():
                ids = original(noun, add_special_tokens=False).input_ids
                nouns[tokenizer.convert_tokens_to_ids(token)] = token, ids

    def drop(self, tokens: Sequence[str]) -> None:
        """Forget tokens; with the last one, undo everything."""
        if any(len(tokenizer) != len(original) + len(self.words) for tokenizer, original in self.tokenizers):
            raise UserError("the tokenizer got other tokens since the first concept: take them out first")
        for (tokenizer, original), nouns in zip(self.tokenizers, self.nouns, strict=True):
            vars(tokenizer).clear()
            vars(tokenizer).update(vars(copy.deepcopy(original)))
            nouns.clear()
        words, self.words = self.words, {}
        self.spell({token: noun for token, noun in words.items() if token not in tokens})
        self.loaded = {token: loaded for token, loaded in self.loaded.items() if token not in tokens}
        self.calls = WeakTensorKeyDictionary()
        if not self.loaded:
            for part in (*self.handles, *self.edited):
                part.remove()

    def put_nouns(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before a text encoder: nouns in place of tokens, and what follows them moved on."""
        ids, end = ids_of(args, kwargs), self.tokenizers[index][0].eos_token_id
        rows, tokens = [], []
        for row in ids.tolist():
            pairs = fill_ids(row, self.nouns[index])[: len(row)]
            if end in row and (end, None) not in pairs:  # a noun longer than its token has moved it out
                pairs[-1] = end, None
            rows.append([id for id, _ in pairs])
            tokens.append([token for _, token in pairs])
        if not any(map(any, tokens)):
            return args, kwargs
        filled = torch.tensor(rows, dtype=ids.dtype, device=ids.device)
        self.texts[filled] = tokens
        return ((filled, *args[1:]), kwargs) if args else (args, kwargs | {"input_ids": filled})

    def mark_texts(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Behind the first text encoder: marks on all states of the rows with concepts, in place."""
        parts = [part if isinstance(part, tuple) else (part,) for part in output.to_tuple()]
        states = [state for state in chain(*parts) if state.dim() == 3]
        for row, tokens in enumerate(self.texts.pop(ids_of(args, kwargs), ())):
            self.mark(tokens, [state[row] for state in states])

    @torch.no_grad()
    def mark(self, tokens: Sequence[str | None], states: Sequence[Tensor]) -> None:
        """Where there is a concept, write a number of its own into each state (L, D), and remember what it means.

        A bit is the smallest change of one component of the first token's encoding, which says nothing of the prompt.
        Otherwise "a cat" and "a <rex>" could not be told apart, or two concepts of one noun.
        """
        if not any(tokens):
            return
        with self.lock:
            self.count = self.count % (2**BITS - 1) + 1
            bits = [self.count >> bit & 1 for bit in range(BITS)]
            for state in states:
                first, eps = state[0, :BITS], torch.finfo(self.key_dtype(state)).eps
                original = first.clone()
                first += 2 * eps * first.abs().clamp(min=1e-3) * torch.tensor(bits, device=state.device)
                self.marks[self.keys(state[None])[0][0]] = tokens, original
            while len(self.marks) > MARKS:
                del self.marks[next(iter(self.marks))]

    def key_dtype(self, text: Tensor) -> torch.dtype:
        """The coarser of the encodings' and the UNet's type: what survives the way from one to the other."""
        return max(text.dtype, self.unet.dtype, key=lambda dtype: torch.finfo(dtype).eps)

    def keys(self, text: Tensor) -> list[list[bytes]]:
        """A key for each row (R, L, D) and each chunk of the text encoder's length."""
        stop = text.shape[1] // self.length * self.length
        ends = text[:, 0 : stop : self.length, :BITS], text[:, self.length - 1 : stop : self.length, :TAIL]
        keys = torch.cat(ends, dim=-1).detach().to(self.key_dtype(text)).double().cpu().numpy()
        return [[key.tobytes() for key in row] for row in keys]

    def read(self, text: Tensor) -> tuple[Tensor, dict[tuple[int, int], Sequence[str | None]]]:
        """Encodings without their marks, and the token at each place of each (row, chunk) that had one."""
        found, clean = {}, text.clone()
        for row, chunks in enumerate(self.keys(text)):
            for chunk, key in enumerate(chunks):
                if key in self.marks:
                    found[row, chunk], original = self.marks[key]
                    clean[row, chunk * self.length, :BITS] = original.to(text)
        return clean if found else text, found

    @torch.compiler.disable
    def call_of(self, text: Tensor) -> Call | Tensor:
        """What the UNet reads in place of encodings (R, L, D): encodings alone where no row has a concept."""
        calls = self.calls
        if text not in calls:
            clean, found = self.read(text)
            calls[text] = self.plan(clean, found) if found else None
        return text if (call := calls[text]) is None else call

    def plan(self, text: Tensor, found: Mapping[tuple[int, int], Sequence[str | None]]) -> Call | Tensor:
        masks: dict[tuple[int, str], Tensor] = {}  # of a row and a concept, (L,)
        for (row, chunk), tokens in found.items():
            for place, token in enumerate(tokens, chunk * self.length):
                if token in self.loaded and self.loaded[token].strength:
                    masks.setdefault((row, token), torch.zeros(text.shape[1], dtype=torch.bool))[place] = True
        if not masks:
            return text
        rows, used = (sorted(set(each)) for each in zip(*masks, strict=True))
        gates = torch.zeros(len(rows), len(used), text.shape[1], device=text.device)
        for (row, token), mask in masks.items():
            loaded = self.loaded[token]
            gate = loaded.gate(text[row][None], mask[None].to(text.device), loaded.target, loaded.inverse_covariance)
            gates[rows.index(row), used.index(token)] = gate[0] * loaded.strength
        residuals = {
            edited.name: torch.stack([self.loaded[token].residuals[edited.name] for token in used]).to(text)
            for edited in self.edited
        }
        return Call(text, torch.tensor(rows, device=text.device), gates.to(text), residuals)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(zip(PLACED, args, strict=False)) | kwargs
        call = kwargs["encoder_hidden_states"] = self.call_of(kwargs["encoder_hidden_states"])
        if isinstance(call, Call):
            kwargs |= {name: call.append(kwargs[name]) for name in APPENDED if name in kwargs}
        return (), kwargs

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        call = kwargs["encoder_hidden_states"]
        if not isinstance(call, Call):
            return output
        own, customised = output[0].split([len(call.text), len(call.rows)])
        sample = own.index_copy(0, call.rows, customised)
        return (sample,) if isinstance(output, tuple) else type(output)(sample=sample)


class Edited:
    """A cross-attention whose rows behind the pipeline's own are customised: `out[rows] + W_out (A_F g) r`.

    Its processor stays its own, so that LoRA, IP-Adapter and others find it, before and after.
    """

    def __init__(self, attention: nn.Module, name: str) -> None:
        self.attention, self.name = attention, name
        self.before, self.base = vars(attention).get("forward"), attention.forward
        attention.forward = self.forward

    def remove(self) -> None:
        del self.attention.forward
        if self.before is not None:
            self.attention.forward = self.before

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Tensor | None = None,
                **kwargs: Any) -> Tensor:  # fmt: skip
        """As diffusers' `Attention.forward`; with image prompts, what stands for the text is a tuple."""
        text = encoder_hidden_states
        call, *images = text if isinstance(text, tuple) else (text,)
        if not isinstance(call, Call):
            return self.base(hidden_states, text, attention_mask, **kwargs)
        hidden = hidden_states[: len(call.text)]
        out = self.base(hidden, (call.text, *images) if images else call.text, attention_mask, **kwargs)
        return torch.cat([out, out[call.rows] + self.edit(hidden[call.rows], call, attention_mask)])

    def edit(self, hidden: Tensor, call: Call, mask: Tensor | None) -> Tensor:
        """`W_out Σ_k a_k ⊗ r_k` of each customised row, (A, N, C), with the mass `a_k = A_F g_k`.

        It is a sum over heads: of each head's mass with what W_out makes of that head's part of r.
        """
        attention, heads, concepts = self.attention, self.attention.heads, call.gates.shape[1]
        q = attention.to_q(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)  # (A, H, N, D)
        k = attention.to_k(call.text[call.rows]).unflatten(-1, (heads, -1)).transpose(1, 2)  # (A, H, L, D)
        values = F.pad(call.gates.mT, (0, max(0, k.shape[-1] - concepts))).to(k)  # (A, L, D): fused kernels want D
        values = values[:, None].expand(-1, heads, -1, -1)
        bias = None if mask is None else mask[call.rows][:, None]
        mass = F.scaled_dot_product_attention(q, k, values, attn_mask=bias)[..., :concepts]  # (A, H, N, K)
        residuals = call.residuals[self.name].to(k).unflatten(-1, (1, heads, -1))  # (K, 1, H, D)
        parts = (torch.eye(heads, dtype=k.dtype, device=k.device)[..., None] * residuals).flatten(0, 1).flatten(1)
        project = attention.to_out[0]
        basis = project(parts) - project(torch.zeros_like(parts[:1]))  # (K·H, C): linear, but for the bias
        return mass.permute(0, 2, 3, 1).flatten(2) @ basis


def ids_of(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """What a text encoder is called with."""
    return args[0] if args else kwargs["input_ids"]


def fill_ids(ids: Sequence[int], nouns: Mapping[int, tuple[str, list[int]]]) -> list[tuple[int, str | None]]:
    """Ids with nouns in place of tokens, each with the token that it is of."""
    return [(i, token) for id in ids for token, noun in [nouns.get(id, (None, [id]))] for i in noun]


def layer_names(unet: nn.Module) -> dict[str, str]:
    """The cross-attentions' names in a concept file (LDM's) -> those in diffusers' UNet."""
    places, number = [("middle_block.1.", "mid_block.attentions.0.")], 0
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            number += 1
            places.append((f"input_blocks.{number}.1.", f"down_blocks.{i}.attentions.{j}."))
        number += bool(block.downsamplers)
    up = [(i, j) for i, block in enumerate(unet.up_blocks) for j in range(len(block.resnets))]
    places += [(f"output_blocks.{n}.1.", f"up_blocks.{i}.attentions.{j}.") for n, (i, j) in enumerate(up)]
    names = [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
    return {name.replace(theirs, ours): name for ours, theirs in places for name in names if name.startswith(theirs)}


def _residuals(pipe: Any, concept: Concept) -> dict[str, Tensor]:
    """A concept's residuals by diffusers' layer, float32 (C,); zero where it learned none.

    Raises:
        ValueError: the pipeline has no such UNet, or the concept is of another method or base model.
    """
    noun, unet = concept.superclass, _plain(getattr(pipe, "unet", None))
    if not isinstance(unet, UNet2DConditionModel):
        raise UserError(f"{type(pipe).__name__} has no UNet2DConditionModel: concepts are of SD 1.5, SD 2.1 and SDXL")
    if concept.method != "infusion" or concept.attention != "foundation":
        raise UserError(
            f"{noun!r} was learned by {concept.method} with {concept.attention} attention; this is for the method "
            "infusion with the foundation's (diffusers itself loads LoRA and textual inversion)"
        )
    here = unet.config.cross_attention_dim, pipe.scheduler.config.get("prediction_type", "epsilon")
    base = BASES.get(concept.architecture, here)
    if base != here:
        raise UserError(
            f"{noun!r} was trained on {concept.architecture!r}, whose text is {base[0]} wide and which predicts "
            f"{base[1]}; this pipeline has {here[0]} and {here[1]}"
        )
    names = layer_names(unet)
    widths = {ours: unet.get_submodule(name).inner_dim for ours, name in names.items()}
    for layer, residual in concept.tensors.items():
        if residual.shape != (widths.get(layer),):
            raise UserError(f"{noun!r}: this UNet has no cross-attention {layer} of width {residual.numel()}")
    return {name: concept.tensors.get(ours, torch.zeros(widths[ours])) for ours, name in names.items()}


def _plain(unet: nn.Module | None) -> nn.Module | None:
    """The UNet itself, of a compiled one."""
    return getattr(unet, "_orig_mod", unet)


def _adapter_of(pipe: Any) -> Adapter | None:
    owners = (getattr(hook, "__self__", None) for hook in pipe.unet._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Adapter)), None)


def _named(pipe: Any, tokens: Sequence[str] | None) -> tuple[Adapter, list[str]]:
    """The pipeline's adapter, and the tokens meant: one, several, or all with None."""
    if (adapter := _adapter_of(pipe)) is None:
        raise UserError("the pipeline has no concept: load_concept gives it one")
    named = list(adapter.loaded) if tokens is None else [tokens] if isinstance(tokens, str) else list(tokens)
    if unknown := [token for token in named if token not in adapter.loaded]:
        raise UserError(f"there is no concept {unknown[0]!r}; there are {', '.join(adapter.loaded)}")
    return adapter, named


def _finite(strength: float) -> float:
    if not math.isfinite(strength):
        raise UserError(f"strength: must be finite, not {strength}")
    return float(strength)
