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

Legend for shapes: R rows of a call, A of them with a concept, K concepts in the call, L text tokens, D their width, C
the width of a layer.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from infusion.concepts.concept import Concept
from infusion.export.marks import Marks, Tokens
from infusion.export.rows import Call, Edited, layer_names, plain
from infusion.gate import Gate, fingerprint
from infusion.sampling.settings import BETA, TAU, Settings
from ldm.util.cli import UserError
from ldm.util.templates import filled_parts

BASES = {  # architecture -> width of its text encodings, and what its UNet predicts
    "sd15": (768, "epsilon"),
    "sd21": (1024, "epsilon"),
    "sd21_768": (1024, "v_prediction"),
    "sdxl": (2048, "epsilon"),
}
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
    loaded = Loaded(
        residuals, concept.gate.replace(gate, beta, tau), Settings(strength=strength).strength, inverse_covariance
    )
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
        factor = was.strength if strength is None else Settings(strength=strength).strength
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
    text, length = prompt_embeds.clone(), adapter.marks.length
    for row, prompt in zip(text, prompts, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        tokens = [token for _, token in fill_ids(ids, adapter.nouns[0])]
        for chunk, part in enumerate(row.split(length)):
            inner = tokens[chunk * (length - 2) :][: length - 2]
            adapter.marks.write([None, *inner, *[None] * (length - 1 - len(inner))], [part])
    return text


class Adapter:
    """The concepts of a UNet, with its hooks and those of the text encoders. There is one while there are concepts."""

    def __init__(self, pipe: Any) -> None:
        pairs = [(getattr(pipe, f"tokenizer{n}", None), getattr(pipe, f"text_encoder{n}", None)) for n in ("", "_2")]
        pairs = [(tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None]
        self.unet, self.marks = pipe.unet, Marks(pipe.unet, pairs[0][0].model_max_length)
        self.tokenizers = [(tokenizer, copy.deepcopy(tokenizer)) for tokenizer, _ in pairs]  # and as it was
        self.nouns: list[dict[int, tuple[str, list[int]]]] = [{} for _ in pairs]  # id -> its token, the noun's ids
        self.words: dict[str, str] = {}  # token -> noun
        self.loaded: dict[str, Loaded] = {}
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
        unet = plain(self.unet)
        self.edited = [Edited(unet.get_submodule(name), name) for name in layer_names(unet).values()]

    @torch.no_grad()
    def load(self, pipe: Any, token: str, concept: Concept, loaded: Loaded) -> None:
        try:
            self.spell({token: concept.superclass})
            parts = [filled_parts(template, [concept.superclass]) for template in concept.templates]  # with its article
            prompts = ["".join(token if i % 2 else part for i, part in enumerate(each)) for each in parts]
            means = []
            for start in range(0, len(prompts), 16):
                text, marks = self.marks.read(
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
            self.marks.write(tokens, [state[row] for state in states])

    @torch.compiler.disable
    def call_of(self, text: Tensor) -> Call | Tensor:
        """What the UNet reads in place of encodings (R, L, D): encodings alone where no row has a concept."""
        calls = self.calls
        if text not in calls:
            clean, found = self.marks.read(text)
            calls[text] = self.plan(clean, found) if found else None
        return text if (call := calls[text]) is None else call

    def plan(self, text: Tensor, found: Mapping[tuple[int, int], Tokens]) -> Call | Tensor:
        masks: dict[tuple[int, str], Tensor] = {}  # of a row and a concept, (L,)
        for (row, chunk), tokens in found.items():
            for place, token in enumerate(tokens, chunk * self.marks.length):
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


def ids_of(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """What a text encoder is called with."""
    return args[0] if args else kwargs["input_ids"]


def fill_ids(ids: Sequence[int], nouns: Mapping[int, tuple[str, list[int]]]) -> list[tuple[int, str | None]]:
    """Ids with nouns in place of tokens, each with the token that it is of."""
    return [(i, token) for id in ids for token, noun in [nouns.get(id, (None, [id]))] for i in noun]


def _residuals(pipe: Any, concept: Concept) -> dict[str, Tensor]:
    """A concept's residuals by diffusers' layer, float32 (C,); zero where it learned none.

    Raises:
        ValueError: the pipeline has no such UNet, or the concept is of another method or base model.
    """
    noun, unet = concept.superclass, plain(getattr(pipe, "unet", None))
    if not isinstance(unet, UNet2DConditionModel):
        raise UserError(f"{type(pipe).__name__} has no UNet2DConditionModel: concepts are of SD 1.5, SD 2.1 and SDXL")
    if concept.method != "infusion" or concept.attention != "foundation":
        raise UserError(
            f"{noun!r} was learned by {concept.method} with {concept.attention} attention; this is for the method "
            "infusion with the foundation's, and others are converted (scripts/convert_concept.py, docs/files.md)"
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
