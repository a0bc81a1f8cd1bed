"""Sampling with concepts of any method: the base model with their edits, and its denoiser for a batch of prompts."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infusion.attention import OwnPass, StackedPass, Tape
from infusion.concepts.concept import Concept
from infusion.deltas import find_layers, in_model, outputs_changed, weights_edited
from infusion.gate import IDENTITY, fingerprint
from infusion.inject import edited
from infusion.methods import method_of
from infusion.methods.base import by_layer
from infusion.sampling.encode import Words, encode, own_embeddings
from infusion.sampling.regions import weights
from infusion.sampling.settings import Settings, for_each
from ldm.models.attention import Context
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError
from ldm.util.templates import bare


class Customised:
    """A base model with concepts in it. Called with prompts, it gives their denoiser.

    The UNet is edited inside the `with` only; outside it is the base model, bit for bit:

        with Customised(sd, [concept], Settings(scale=7.5)) as customised:
            images = sd.sample(["a photo of a {}"], customised, steps=50)

    Args:
        sd: the base model.
        concepts: K concepts; "{}" in a prompt is the only one, "{1}", "{2}" … are several.
        settings: how they are blended, and the guidance; what `StableDiffusion.sample` decides is ignored here.
        inverse_covariance: C^-1, (D, D), when the concepts were trained with one.

    Raises:
        ValueError: no concepts; a concept of another architecture, of an unknown method, with tensors that the UNet has
            no place for or with another covariance; concepts of different attention; settings for another number of
            concepts.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        concepts: Sequence[Concept],
        settings: Settings | None = None,
        inverse_covariance: Tensor | None = None,
    ) -> None:
        if not concepts:
            raise ValueError("customised sampling needs at least one concept")
        settings = Settings() if settings is None else settings
        self.sd, self.settings, self.inverse_covariance = sd, settings, inverse_covariance
        for concept in concepts:
            concept.check_base(sd.architecture, sd.hash)
        self.methods = [method_of(concept) for concept in concepts]
        check_covariance(concepts, inverse_covariance)
        count = len(concepts)
        betas, taus = for_each(settings.beta, count, "beta"), for_each(settings.tau, count, "tau")
        kinds = [None] * count if settings.gate is None else for_each(settings.gate, count, "gate")
        self.nouns = nouns_of(concepts, settings.noun)
        strengths = for_each(settings.strength, count, "strength")
        weights(settings.region, count, (1, 1))  # refuses a region of no concept

        self.gates = [concept.gate.replace(*own) for concept, *own in zip(concepts, kinds, betas, taus, strict=True)]
        self.tokens, self.targets = [], []  # of each concept: its word's embeddings, and its gate's i*; either or none
        self.changes: dict[str, list[nn.Module]] = {}  # tensor of the model -> what changes it
        self.outputs: list[tuple[str, nn.Module]] = []  # layer of the UNet, and what changes its output
        self.owners, terms = [], []  # of R terms: each one's concept, and its edits by layer
        for k, (concept, method) in enumerate(zip(concepts, self.methods, strict=True)):
            self.tokens.append(_blended(method.tokens(concept.tensors), sd, self.nouns[k], strengths[k]))
            own = method.terms(sd, concept.tensors, concept.word)
            self.targets.append(method.target(sd, concept.tensors, concept.word) if own else None)
            self.owners += [k] * len(own)
            terms += own
            for name, change in method.differences(concept.tensors, strengths[k]).items():
                self.changes.setdefault(in_model(name), []).append(change)
            outputs = method.outputs(concept.tensors, strengths[k])
            self.outputs += [(name, change.to(sd.device)) for name, change in outputs.items()]
        self.own = _common_attention([concepts[k] for k in dict.fromkeys(self.owners)]) == "own"
        self.edits = by_layer(sd, terms, self.tokens)
        for edits in self.edits.values():
            edits.to(sd.device)  # a concept lies on the CPU
        self.strengths = torch.tensor(strengths, dtype=torch.float32, device=sd.device)[self.owners]  # (R,)

    def __enter__(self) -> "Customised":
        with ExitStack() as stack:
            stack.enter_context(edited(self.sd.unet, {}))  # weights have their own names in a plain UNet
            self.changed = find_layers(self.sd.unet, self.outputs)
            stack.enter_context(weights_edited(self.sd, self.changes))
            stack.enter_context(edited(self.sd.unet, self.edits))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.__exit__(*exception)

    def __call__(self, prompts: Sequence[str], map_grid: tuple[int, int] | None = None) -> "CustomisedDenoiser":
        """The denoiser of B prompts; arguments and errors as of `CustomisedDenoiser`."""
        return CustomisedDenoiser(self, prompts, map_grid)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Context, Tensor]:
        """A rows for the UNet and gates (A, R, L) of B prompts, with the negative prompt's B rows before them.

        A scale of 1 needs no negative prompt.
        """
        sd, settings = self.sd, self.settings
        context, masks = encode(sd.text, prompts, self.nouns, self.tokens, whole=True)  # masks are (B, K, L)
        masks = masks.to(context.text.device)
        if settings.scale != 1:
            negative = [sd.text.unconditional(settings.negative_prompt)] * len(prompts)
            context = Context.cat([*negative, context])
            longer = context.text.shape[1] - masks.shape[2]  # the negative prompt, which has no concept's tokens
            masks = F.pad(masks, (0, longer, 0, 0, len(prompts), 0))
        compared = sd.text.comparable(context.text)
        gates = [
            method.gates(gate, compared, masks[:, k], target, self.inverse_covariance)
            for k, (method, gate, target) in enumerate(zip(self.methods, self.gates, self.targets, strict=True))
        ]
        return context.to(sd.device, sd.dtype), torch.cat(gates, dim=1).to(sd.device)


class CustomisedDenoiser:
    """Guidance towards B prompts with concepts in them, one UNet call a step. Use it while its model is edited.

    With the foundation's attention, three rows per image: unconditional, foundation, customised. An image without a
    concept needs no third row; a scale of 1 needs no first. Concepts with attention "own" take two, and their gates
    read both: those on the concept's tokens are 0 in an unconditional row, and a "global" one acts there as well, as
    Perfusion's edit of the weights does.

    Args:
        model: the base model with the concepts.
        prompts: B prompts, with placeholders where the concepts are.
        map_grid: (rows, columns) of the `attention_maps` to collect; None collects none.

    Attributes:
        context: of the unconditional and the foundation rows, A of them; A is B at a scale of 1, else 2 B.
        text: their encodings, (A, L, D).
        gates: (A, R, L), of R terms.

    Raises:
        ValueError: no prompts, or a placeholder that is no word of its own or of no concept.
    """

    def __init__(self, model: Customised, prompts: Sequence[str], map_grid: tuple[int, int] | None = None) -> None:
        if not prompts:
            raise ValueError("customised sampling needs at least one prompt")
        self.model, self.rows, self.map_grid = model, len(prompts), map_grid
        self.context, self.gates = model.encode(prompts)
        self.text = self.context.text
        acting = self.gates[-self.rows :] * (model.strengths != 0)[:, None]
        self.active = acting.flatten(1).any(1).nonzero().flatten()  # images with terms in them
        self.customised = self.active[:0] if model.own else self.active  # those with a row behind the others
        following = self.context.map(lambda rows: rows[-self.rows :][self.customised])
        self.stacked = Context.cat([self.context, following])  # of all rows
        self._maps, self._calls = 0.0, 0

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The guided prediction.

        Args:
            latents: noisy, (B, 4, h, w). timestep: integer scalar, or (B,).

        Returns:
            (B, 4, h, w) in the model's own prediction type and the latents' dtype.

        Raises:
            ValueError: not one image for each prompt.
        """
        if len(latents) != self.rows:
            raise ValueError(f"{len(latents)} latents for {self.rows} prompts")
        guided = len(self.text) - self.rows  # how many unconditional rows come first
        tape: Tape = {}
        copies = 2 if guided else 1
        rows = torch.cat([torch.arange(self.rows, device=latents.device).repeat(copies), self.customised])
        context = self._context(tape, latents.shape[2:])
        unet, timesteps = self.model.sd.unet, timestep.expand(self.rows)[rows]
        with outputs_changed(self.model.changed, timesteps):
            prediction = unet(latents.to(self.text.dtype)[rows], timesteps, context)
        prediction, customised = prediction.to(latents.dtype).split([len(self.text), len(self.customised)])
        conditional = prediction[guided:].index_copy(0, self.customised, customised)
        self._record(tape, latents.shape[2:])
        if not guided:
            return conditional
        unconditional = prediction[:guided]
        return unconditional + self.model.settings.scale * (conditional - unconditional)

    @property
    def attention_maps(self) -> Tensor:
        """Foundation attention on each concept's tokens, weighted by its gate: mean over heads, layers and calls.

        Returns:
            (B, R, *map_grid) float32 in [0, 1], one for each term; Infusion has one for each concept.

        Raises:
            ValueError: none were asked for, the concepts' methods have none, or there has been no call.
        """
        if self.map_grid is None or not self._calls or not self.model.owners:
            raise ValueError("no attention maps: ask for them by map_grid=(rows, columns), and denoise first")
        return self._maps / self._calls

    def _context(self, tape: Tape, size: torch.Size) -> Context:
        model = self.model
        if not model.owners or not len(self.active) and self.map_grid is None:
            return self.context  # no term anywhere
        regions = weights(model.settings.region, len(model.methods), size)  # (K, h, w)
        regions = None if regions is None else regions[model.owners].to(self.text.device)
        if model.own:
            own = {"gates": self.gates, "strengths": model.strengths, "regions": regions, "tape": tape}
            return self.context.becomes(OwnPass, **own)
        return self.stacked.becomes(
            StackedPass,
            gates=self.gates[-self.rows :],
            rows=self.customised,
            strengths=model.strengths,
            regions=regions,
            tape=None if self.map_grid is None else tape,
        )

    def _record(self, tape: Tape, size: torch.Size) -> None:
        if self.map_grid is None or not self.model.owners:
            return
        self._calls += 1
        maps = torch.zeros(self.rows, self.gates.shape[1], *self.map_grid, device=self.text.device)
        for _, mass in tape.values():
            mass = mass[-self.rows :].float().mean(2)  # (B, K, N)
            factor = round((size.numel() / mass.shape[2]) ** 0.5)
            mass = mass.unflatten(2, (size[0] // factor, size[1] // factor))
            maps += F.interpolate(mass, self.map_grid, mode="bilinear") / len(tape)
        self._maps = self._maps + maps


def check_covariance(concepts: Sequence[Concept], inverse_covariance: Tensor | None) -> None:
    """Raises ValueError for a concept that was trained with another C^-1, (D, D), than this; None is the identity."""
    here = fingerprint(inverse_covariance)
    for concept in concepts:
        noun, there = concept.superclass, concept.covariance
        if there != here and there == IDENTITY:
            raise UserError(f"{noun!r} was trained without a covariance: sample without one too (no --covariance)")
        if there != here:
            raise UserError(
                f"{noun!r} was trained with the covariance {there[:12]}, and here is {here[:12]}: "
                "its gate needs the same file (--covariance FILE)"
            )


def nouns_of(concepts: Sequence[Concept], noun: str | Sequence[str] | None = None) -> list[str]:
    """What stands in prompts for each concept; `noun`: see `Settings`."""
    if noun is None:
        return [concept.noun for concept in concepts]
    return [bare(word) for word in for_each(noun, len(concepts), "noun")]


def _common_attention(concepts: Sequence[Concept]) -> str:
    """Of concepts that all have terms; raises ValueError where they differ."""
    for concept in concepts:
        if concept.attention != concepts[0].attention:
            raise UserError(
                f"{concepts[0].superclass!r} was trained with {concepts[0].attention} attention and "
                f"{concept.superclass!r} with {concept.attention} attention: they cannot be sampled together"
            )
    return concepts[0].attention if concepts else "own"


def _blended(learned: Words | None, sd: StableDiffusion, noun: str, strength: float) -> Words | None:
    """Learned input embeddings (T, D), and with another strength than 1 the vocabulary's as much closer."""
    if learned is None or strength == 1:
        return learned
    if isinstance(learned, Mapping):
        return {name: _blended(rows, sd, noun, strength) for name, rows in learned.items()}
    usual = own_embeddings(sd.text, noun)
    if len(usual) < len(learned):
        raise UserError(f"{noun!r} has {len(usual)} tokens, the concept {len(learned)}: its strength can only be 1")
    usual = usual[: len(learned)]
    return usual + strength * (learned.to(usual) - usual)
