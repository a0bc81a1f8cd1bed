"""Sampling with concepts of any method: a denoiser with their edits in place of the plain UNet."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infusion.attention import OwnPass, StackedPass, Tape
from infusion.concepts.concept import Concept
from infusion.deltas import weights_edited
from infusion.gate import IDENTITY, fingerprint
from infusion.inject import edited
from infusion.methods import method_of
from infusion.methods.base import Method, by_layer
from infusion.sampling.encode import encode, own_embeddings
from infusion.sampling.regions import Region, weights
from infusion.sampling.settings import BETA, TAU
from ldm.pipeline import StableDiffusion

Value = TypeVar("Value", float, str)


class Customised:
    """Classifier-free guidance towards prompts with concepts in them; a denoiser for `ldm.diffusion.sampler.sample`.

    With the foundation's attention, three rows per image in one UNet call: unconditional, foundation, customised. An
    image without a concept needs no third row; a scale of 1 needs no first. Concepts with attention "own" take two, and
    their gates read both: those on the concept's tokens are 0 in an unconditional row, and a "global" one acts there as
    well, as Perfusion's edit of the weights does. The UNet is edited inside the `with` only:

        with Customised(sd, [concept], ["a photo of a {}"], "", scale=7.5) as denoise:
            latents = sample(denoise, sd.schedule.scheduler("ddim"), noise, steps=50)

    Args:
        sd: the base model.
        concepts: K concepts; "{}" in a template is the only one, "{1}", "{2}" … are several.
        templates: one prompt for each of B images.
        negative: what to be guided away from, one for all images or one each.
        scale: guidance; 1 is none.
        beta, tau: of the gates, one for all concepts or one each; None is 0.7 and 0.15.
        strengths: factors on what the concepts learned, one for all or one each; None is 1.
        gate: kind of the gates (`infusion.gate.Gate`), one for all or one each; None is what each was trained with.
        nouns: what stands in the prompts for the concepts, one each; None is what each was trained with.
        regions: boxes that concepts keep to; a concept without one acts everywhere.
        inverse_covariance: C^-1, (D, D), when the concepts were trained with one.
        map_grid: (rows, columns) of the `attention_maps` to collect; None collects none.

    Raises:
        ValueError: no concepts or prompts, a concept of another architecture, of an unknown method, with tensors that
            the UNet has no place for or with another covariance; concepts of different attention; numbers that do not
            match; whatever `concept_places` refuses in a template.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        concepts: Sequence[Concept],
        templates: Sequence[str],
        negative: str | Sequence[str] = "",
        scale: float = 7.5,
        beta: float | Sequence[float] | None = None,
        tau: float | Sequence[float] | None = None,
        strengths: float | Sequence[float] | None = None,
        gate: str | Sequence[str] | None = None,
        nouns: Sequence[str] | None = None,
        regions: Sequence[Region] = (),
        inverse_covariance: Tensor | None = None,
        map_grid: tuple[int, int] | None = None,
    ) -> None:
        if not concepts or not templates:
            raise ValueError("customised sampling needs at least one concept and one prompt")
        negatives = [negative] * len(templates) if isinstance(negative, str) else list(negative)
        if len(negatives) != len(templates):
            raise ValueError(f"there are {len(negatives)} negative prompts for {len(templates)} prompts")
        methods = _methods(sd, concepts)
        check_covariance(concepts, inverse_covariance)
        self.unet = sd.unet
        self.scale = scale
        self.own = concepts[0].attention == "own"
        self.map_grid = map_grid
        self._maps, self._calls = 0.0, 0

        betas = _each(BETA if beta is None else beta, len(concepts), "beta")
        taus = _each(TAU if tau is None else tau, len(concepts), "tau")
        kinds = [None] * len(concepts) if gate is None else _each(gate, len(concepts), "gate")
        nouns = [concept.noun for concept in concepts] if nouns is None else _each(nouns, len(concepts), "noun")
        strengths = _each(1.0 if strengths is None else strengths, len(concepts), "strength")
        weights(regions, len(concepts), (1, 1))  # refuses a region of no concept
        self.regions = tuple(regions)
        self.rows, self.concepts = len(templates), len(concepts)

        changes: dict[str, list[nn.Module]] = {}  # tensor of the UNet -> what changes it
        terms, learned = [], []
        for concept, method, noun, strength in zip(concepts, methods, nouns, strengths, strict=True):
            learned.append(_blended(method.tokens(concept.tensors), sd, noun, strength))
            terms.append(method.terms(sd, concept.tensors, concept.superclass, concept.templates))
            for name, change in method.differences(concept.tensors, strength).items():
                changes.setdefault(name, []).append(change)
        self.changes = changes
        self.edits = by_layer([term for own in terms for term in own])
        for edits in self.edits.values():
            edits.to(sd.device)  # a concept lies on the CPU
        self.owners = [k for k, own in enumerate(terms) for _ in own]  # of R terms: each one's concept

        with torch.no_grad():
            text, masks = encode(sd.text, templates, nouns, learned)  # (B, L, D), (B, K, L)
            masks = masks.to(text.device)
            if scale != 1:
                text = torch.cat([sd.text(negatives), text])
                masks = F.pad(masks, (0, 0, 0, 0, len(templates), 0))  # no concept's tokens are in a negative prompt
            gates = []
            for k, (concept, method) in enumerate(zip(concepts, methods, strict=True)):
                target = None
                if terms[k]:
                    target = method.target(sd, concept.tensors, concept.superclass, concept.templates)
                own = concept.gate.but(kinds[k], betas[k], taus[k])
                gates.append(method.gates(own, text, masks[:, k], target, inverse_covariance))
            text = text.to(sd.device, sd.dtype)
        self.text = text  # (B or 2B, L, D)
        self.gates = torch.cat(gates, dim=1).to(sd.device)  # (B or 2B, R, L)
        strengths = torch.tensor(strengths, dtype=torch.float32, device=text.device)
        self.strengths = strengths[self.owners]  # (R,)
        acting = self.gates[-self.rows :] * (self.strengths != 0)[:, None]
        self.active = acting.flatten(1).any(1).nonzero().flatten()  # images with terms in them
        self.customised = self.active[:0] if self.own else self.active  # those with a row behind the others
        self.stacked = torch.cat([text, text[-self.rows :][self.customised]])  # encodings of all rows
        self._stack = ExitStack()

    def __enter__(self) -> "Customised":
        self._stack.enter_context(edited(self.unet, self.edits))
        self._stack.enter_context(weights_edited(self.unet, self.changes))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.__exit__(*exception)

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
        prediction = self.unet(latents.to(self.text.dtype)[rows], timestep.expand(self.rows)[rows], context)
        prediction, customised = prediction.to(latents.dtype).split([len(self.text), len(self.customised)])
        conditional = prediction[guided:].index_copy(0, self.customised, customised)
        self._record(tape, latents.shape[2:])
        if not guided:
            return conditional
        unconditional = prediction[:guided]
        return unconditional + self.scale * (conditional - unconditional)

    @property
    def attention_maps(self) -> Tensor:
        """Foundation attention on each concept's tokens, weighted by its gate: mean over heads, layers and calls.

        Returns:
            (B, R, *map_grid) float32 in [0, 1], one for each term; Infusion has one for each concept.

        Raises:
            ValueError: none were asked for, the concepts' methods have none, or there has been no call.
        """
        if self.map_grid is None or not self._calls or not self.owners:
            raise ValueError("no attention maps: construct with map_grid=(rows, columns), and denoise first")
        return self._maps / self._calls

    def _context(self, tape: Tape, size: torch.Size) -> Tensor | StackedPass | OwnPass:
        if not self.owners or not len(self.active) and self.map_grid is None:
            return self.text  # no term anywhere
        regions = weights(self.regions, self.concepts, size)  # (K, h, w)
        regions = None if regions is None else regions[self.owners].to(self.text.device)
        if self.own:
            return OwnPass(self.text, self.gates, tape, self.strengths, regions)
        kept = None if self.map_grid is None else tape
        return StackedPass(self.stacked, self.gates[-self.rows :], self.customised, self.strengths, regions, kept)

    def _record(self, tape: Tape, size: torch.Size) -> None:
        if self.map_grid is None or not self.owners:
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
            raise ValueError(f"{noun!r} was trained without a covariance: sample without one too (no --covariance)")
        if there != here:
            raise ValueError(
                f"{noun!r} was trained with the covariance {there[:12]}, and here is {here[:12]}: "
                "its gate needs the same file (--covariance FILE)"
            )


def _methods(sd: StableDiffusion, concepts: Sequence[Concept]) -> list[Method]:
    for concept in concepts:
        concept.check_base(sd.architecture, sd.hash)
        if concept.attention != concepts[0].attention:
            raise ValueError(
                f"{concepts[0].superclass!r} was trained with {concepts[0].attention} attention and "
                f"{concept.superclass!r} with {concept.attention} attention: they cannot be sampled together"
            )
    return [method_of(concept) for concept in concepts]


def _blended(learned: Tensor | None, sd: StableDiffusion, noun: str, strength: float) -> Tensor | None:
    """Learned input embeddings (T, D), and with another strength than 1 the vocabulary's as much closer."""
    if learned is None or strength == 1:
        return learned
    usual = own_embeddings(sd.text, noun)
    if len(usual) < len(learned):
        raise ValueError(f"{noun!r} has {len(usual)} tokens, the concept {len(learned)}: its strength can only be 1")
    usual = usual[: len(learned)]
    return usual + strength * (learned.to(usual) - usual)


def _each(value: Value | Sequence[Value], concepts: int, name: str) -> list[Value]:
    values = [value] if isinstance(value, int | float | str) else list(value)
    if len(values) == 1:
        values = values * concepts
    if len(values) != concepts:
        raise ValueError(f"give one {name} for all concepts or one for each of {concepts}, not {len(values)}")
    return values
