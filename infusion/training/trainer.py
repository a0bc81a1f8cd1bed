"""Trains a concept by any method: the base model is frozen, and what is learned is edited into it."""

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from infusion.attention import Tape, residual_share
from infusion.concepts.concept import Concept
from infusion.covariance import InverseCovariance
from infusion.deltas import attach, find_layers, in_model, is_of_text, outputs_changed, weights_edited
from infusion.gate import Gate, fingerprint
from infusion.inject import inject, unedited
from infusion.loss import masked_loss
from infusion.methods.base import Method, by_layer
from infusion.regularisers.base import Regulariser, Step
from infusion.sampling.encode import each, encode
from infusion.tokens import Word
from infusion.training.learner import Learner, check_alike
from infusion.training.words import check_caption, check_samples, check_training_words
from ldm.models.attention import Context
from ldm.pipeline import StableDiffusion
from ldm.training.callbacks import EverySteps
from ldm.util.cli import UserError, check_range, naming
from ldm.util.config import find
from ldm.util.run import NonFinite
from ldm.util.templates import bare

logger = logging.getLogger(__name__)


class ConceptTrainer(Learner):
    """One concept on one base model (docs/method.md). Injects the method's edits into the UNet for good.

    A batch is a dict: latents (B, 4, h, w), scaled; template, a list of B prompts with {} for the concept; mask
    (B, 1, h, w) in [0, 1], or no such key for a loss over the whole image; sizes (B, 6), see `Context`, or no such key
    for whole pictures; prior, where there are images of the superclass to keep, another such dict without placeholders.
    Timesteps and noise depend on seed, step and batch
    alone: a resumed run draws the same, and of several processes each takes its part of what one would draw.

    Args:
        sd: the base model, which is frozen.
        method: what is learned.
        superclass: the noun in place of {}.
        templates: the training prompts, over which the gate's target input is averaged.
        gate: its beta and tau are for training.
        learning_rate: of AdamW, where the method has none of its own.
        weight_decay: of AdamW.
        prior_weight: of the loss on the images of the superclass.
        normalise_loss: divide each image's loss by its mask's area.
        seed: of timesteps and noise.
        covariance: of the gate; None is the identity.
        regularisers: name in the logs -> a term of the loss, or None.
        start_from: a concept file, or a run folder whose last one is meant, of the same method and base model: what it
            learned is where this training starts. Steps are counted from 0 again.

    Attributes:
        tensors: what the concept consists of, by name; those that require gradients are learned.
        inverse_covariance: C^-1, (D, D), of the gate; None is the identity.

    Raises:
        ValueError: words that `check_training_words` refuses; a method that matches no layer; a covariance
            of another architecture.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        method: Method,
        superclass: str,
        templates: Sequence[str],
        gate: Gate | None = None,
        learning_rate: float = 0.01,
        weight_decay: float = 0.01,
        prior_weight: float = 1.0,
        normalise_loss: bool = False,
        seed: int = 0,
        covariance: InverseCovariance | None = None,
        regularisers: Mapping[str, Regulariser | None] | None = None,
        start_from: str | Path | None = None,
    ) -> None:
        super().__init__()
        check_range("learning_rate", learning_rate, 0, 1000, inside=True)
        check_range("weight_decay", weight_decay, 0)
        check_range("prior_weight", prior_weight, 0)
        check_range("seed", seed, 0, 2**32 - 1)
        self.sd = sd.requires_grad_(False).eval()
        self.method = method
        superclass = bare(superclass)
        self.word = Word(superclass, tuple(templates))
        self.gate = Gate() if gate is None else gate
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.prior_weight, self.normalise_loss = prior_weight, normalise_loss
        self.seed = seed
        self.inverse_covariance = None if covariance is None else covariance.matrix
        if self.inverse_covariance is not None:
            covariance.check_base(sd.architecture, sd.digests.get("text"), sd.text.width)
        self.noun = method.noun(superclass)
        check_training_words(sd.text.tokenizer, superclass, self.noun, self.word.templates)
        self.tensors = method.start(sd, self.word)
        if start_from is not None:
            self._start_from(find(start_from))
        self.tokens = method.tokens(self.tensors)
        self.words = nn.ParameterList([] if self.tokens is None else each(self.tokens))  # so that they are registered
        terms = method.terms(sd, self.tensors, self.word)
        edits = {in_model(name): [edit] for name, edit in method.differences(self.tensors).items()}
        attach(sd, edits)
        self.reads = self.tokens is not None or any(map(is_of_text, edits))  # whether encodings change in training
        outputs = method.outputs(self.tensors)
        self.outputs, self.changed = nn.ModuleList(outputs.values()), find_layers(sd.unet, list(outputs.items()))
        self.acts = bool(terms)
        self.edits = by_layer(sd, terms, [self.tokens])  # layer -> terms; inject() makes them parts of the UNet
        if self.edits:
            inject(sd.unet, self.edits)
        self.regularisers = {name: term for name, term in (regularisers or {}).items() if term is not None}
        for name, term in self.regularisers.items():
            with naming(f"regularisers.{name}"):
                term.start(sd, method, self.tensors, self.word)
        self._texts: dict[str, tuple[Context, Tensor]] = {}  # template -> one row, gates (1, R, L)
        self._target_input: Tensor | None = None

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        tape: Tape = {}
        encoded = self.encode(batch["template"])
        loss = self.denoising_loss(batch, self.generator(batch_idx), tape, encoded)
        size = len(batch["latents"])
        if "prior" in batch or self.regularisers:
            self.log("train/concept", loss, batch_size=size)
        if "prior" in batch:
            prior = self.denoising_loss(batch["prior"], self.generator(batch_idx, 1), {})
            self.log("train/prior", prior, batch_size=size)
            loss = loss + self.prior_weight * prior
        for name, term in self.regularisers.items():
            if term.weight:
                value = term.term(self.sd, self.method, self.tensors, self.step(name, batch, batch_idx, encoded[0]))
                self.log(f"train/{name}", value, batch_size=size)
                loss = loss + term.weight * value
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        if self.logs_now:
            self.log_dict({f"share/{name}": s for name, s in self.shares(tape).items()}, batch_size=size)
        return loss

    def step(self, name: str, batch: Mapping[str, Any], batch_idx: int, context: Context) -> Step:
        """What a regulariser sees of a batch with the rows `context` for the UNet, of B prompts."""
        generator = self.generator(batch_idx, 2, zlib.crc32(name.encode()))

        def predictions(others: Sequence[str]) -> tuple[Tensor, Tensor]:
            timesteps, noise = self.draw(batch["latents"], generator)
            noisy = self.sd.schedule.add_noise(batch["latents"], noise, timesteps).to(context.text.dtype)
            with torch.no_grad(), self.unedited():
                plain = self.sd.text.context(self.sd.text.tokenizer(others)).to(noisy.device, noisy.dtype)
                base = self.sd.unet(noisy, timesteps, replace(plain, sizes=batch.get("sizes")))
            rows, gates = self.encode(others)
            return self.predict(noisy, timesteps, replace(rows, sizes=batch.get("sizes")), gates, {}), base

        def log(part: str, value: Tensor) -> None:
            self.log(f"train/{name}_{part}", value, batch_size=len(context.text))

        return Step(batch["template"], context.text, generator, predictions, log)

    def generator(self, batch_idx: int, *which: int) -> torch.Generator:
        """What a batch's timesteps and noise are drawn by; `which` tells batches of one step apart."""
        if self._trainer is not None:  # of the whole run, not of a resumed one
            together = self.trainer.accumulate_grad_batches
            batch_idx = self.global_step * together + batch_idx % together
        entropy = (self.seed, self.global_step, batch_idx, 0, *which)
        return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def draw(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) and noise for latents (B, 4, h, w): this process's part of what is drawn for all."""
        rows, world = len(latents), 1 if self._trainer is None else self._trainer.world_size
        own = slice(self.global_rank * rows, (self.global_rank + 1) * rows)
        timesteps = torch.randint(self.sd.schedule.timesteps, (world * rows,), generator=generator)[own]
        noise = torch.randn((world * rows, *latents.shape[1:]), generator=generator)[own]
        return timesteps.to(latents.device), noise.to(latents)

    def denoising_loss(
        self,
        batch: Mapping[str, Any],
        generator: torch.Generator,
        tape: Tape,
        encoded: tuple[Context, Tensor] | None = None,
    ) -> Tensor:
        """The masked loss of a batch, with timesteps and noise by the generator; fills the tape.

        `encoded` is what `encode` gives for its templates; None encodes them.
        """
        latents, schedule = batch["latents"], self.sd.schedule
        timesteps, noise = self.draw(latents, generator)
        context, gates = self.encode(batch["template"]) if encoded is None else encoded
        context = replace(context, sizes=batch.get("sizes"))
        noisy = schedule.add_noise(latents, noise, timesteps).to(context.text.dtype)
        prediction = self.predict(noisy, timesteps, context, gates, tape)
        target = schedule.target(latents, noise, timesteps)
        return masked_loss(prediction, target, batch.get("mask"), self.normalise_loss)

    def predict(self, noisy: Tensor, timesteps: Tensor, context: Context, gates: Tensor, tape: Tape) -> Tensor:
        """The customised model's prediction; arguments and shapes as of `Method.predict`."""
        with outputs_changed(self.changed, timesteps):
            return self.method.predict(self.sd.unet, noisy, timesteps, context, gates, tape)

    def encode(self, templates: Sequence[str]) -> tuple[Context, Tensor]:
        """B rows for the UNet, and gates (B, R, L).

        The text encoder runs once for each template, unless the concept's own word or the encoder is learned.
        """
        if self.reads:
            context, gates = self._encode(templates)
            return context.to(self.device), gates.to(self.device)
        for template in templates:
            if template not in self._texts:
                with torch.no_grad():
                    self._texts[template] = self._encode([template])
        contexts, gates = zip(*(self._texts[template] for template in templates), strict=True)
        return Context.cat(contexts).to(self.device), torch.cat(gates).to(self.device)

    @property
    def logs_now(self) -> bool:
        """Whether Lightning writes to the logger at the end of this optimiser step."""
        return self._trainer is not None and (self.global_step + 1) % self.trainer.log_every_n_steps == 0

    def shares(self, tape: Tape) -> dict[str, Tensor]:
        """Norm of what the terms add to the values' sum as a share of that sum, by layer, averaged over the rows."""
        shares = {}
        for name, terms in self.edits.items():
            if name in tape and name in self.tensors:
                residuals = torch.stack([term.residual for term in terms])  # (R, C)
                shares[name] = residual_share(*tape[name], residuals).mean()
        return shares

    def check_caption(self, caption: str) -> None:
        """As `infusion.training.words.check_caption`, which a training's data ask before the first step."""
        check_caption(self.sd.text.tokenizer, caption, self.noun)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for a prompt with {} that cannot be drawn whole."""
        check_samples(self.sd.text.tokenizer, prompts, self.noun)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Inside the `with`, `sd` is the base model without what is being trained."""
        with unedited(self.sd.unet), weights_edited(self.sd.text, {}):
            yield

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = self.method.groups(self.tensors)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=self.weight_decay)
        optimizer.register_step_post_hook(self._settle)
        return optimizer

    @torch.no_grad()
    def _settle(self, *_: object) -> None:
        for term in self.regularisers.values():
            term.settle(self.tensors)

    def concept(self) -> Concept:
        """What has been learned so far.

        Raises:
            ValueError: the residuals are not finite.
        """
        return Concept(
            tensors=dict(self.tensors),
            superclass=self.word.superclass,
            templates=self.word.templates,
            architecture=self.sd.architecture,
            base_hash=self.sd.hash,
            base_use_ema=self.sd.use_ema,
            base_parts=self.sd.parts,
            gate=self.gate,
            covariance=fingerprint(self.inverse_covariance),
            method=self.method.name,
            attention=self.method.attention,
            options=self.method.options,
            noun=self.noun,
            steps=self.global_step,
            learning_rate=self.learning_rate,
            seed=self.seed,
            batch_size=self._batch_size(),
        )

    @torch.no_grad()
    def _start_from(self, path: Path) -> None:
        """Gives what is learned the values of a concept; ValueError for one of another method, size or base model."""
        concept = Concept.load(path)
        with naming(f"start_from: {path}"):
            if concept.method != self.method.name:
                raise UserError(f"learned by {concept.method}, and this training is of {self.method.name}")
            concept.check_base(self.sd.architecture, self.sd.hash)
            check_alike(self.tensors, concept.tensors, "the concept does not fit the method")
        if concept.superclass != self.word.superclass:
            words = concept.superclass, self.word.superclass
            logger.warning("warning: start_from: %s was trained as %r, and goes on as %r", path, *words)
        for name, tensor in self.tensors.items():
            tensor.copy_(concept.tensors[name])
        logger.info("starts from %s, after its %d steps", path, concept.steps)

    def _batch_size(self) -> int:
        """Photos of an optimiser step, over accumulated batches and devices; 0 where no data say how many."""
        data = None if self._trainer is None else self.trainer.datamodule
        size = getattr(data, "batch_size", 0)
        return size * self.trainer.accumulate_grad_batches * self.trainer.world_size if size else 0

    def train(self, mode: bool = True) -> "ConceptTrainer":
        """Sets the mode of this module; the base model stays in evaluation mode."""
        super().train(mode)
        self.sd.eval()
        return self

    def _encode(self, templates: Sequence[str]) -> tuple[Context, Tensor]:
        context, masks = encode(self.sd.text, templates, [self.noun], [self.tokens])  # masks are (B, 1, L)
        text = context.text
        mask = masks[:, 0].to(text.device)
        self.method.observe(self.tensors, *(self._everyone(rows) for rows in (text.detach(), mask)))
        if self.acts and (self._target_input is None or self.tokens is not None):
            self._target_input = self.method.target(self.sd, self.tensors, self.word)
        compared = self.sd.text.comparable(text)
        gates = self.method.gates(self.gate, compared, mask, self._target_input, self.inverse_covariance)
        return context.to(text.device, self.sd.dtype), gates

    def _everyone(self, rows: Tensor) -> Tensor:
        """The rows of all processes, where every process encodes at every step: (B, …) -> (world · B, …)."""
        together = self.tokens is not None and self._trainer is not None and self._trainer.world_size > 1
        return self.all_gather(rows).flatten(0, 1) if together else rows


class SaveConcept(EverySteps):
    """Writes `step=000500.safetensors` every so many optimiser steps, and when training ends or fails by a number.

    Args:
        every: optimiser steps between two files.
    """

    def __init__(self, every: int = 100) -> None:
        super().__init__(every)

    def on_exception(self, trainer: pl.Trainer, pl_module: ConceptTrainer, exception: BaseException) -> None:
        if isinstance(exception, NonFinite):
            self.now(trainer, pl_module)

    def act(self, trainer: pl.Trainer, module: ConceptTrainer) -> None:
        self.write(module, Path(trainer.default_root_dir) / "models", f"step={trainer.global_step:06d}.safetensors")

    def write(self, module: ConceptTrainer, folder: Path, name: str) -> None:
        module.concept().save(folder / name)
