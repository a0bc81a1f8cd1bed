"""Trains K Infusion concepts at once: one batch, one frozen UNet, and for every layer one bank of K residuals.

With B rows for each concept, the loss is `Σ_k mean over the B rows of k`. Row b has the residual of its own concept k
alone, `out_F + a_b ⊗ R[k]` with the bank R, so that `∂loss / ∂R[k]` is the gradient of concept k's own training; and
AdamW works number by number. What is learned is therefore what K trainings apart learn, up to rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infusion.attention import CustomisedPass, EditedCrossAttention, FoundationPass, Tape
from infusion.concepts.concept import Concept
from infusion.covariance import InverseCovariance
from infusion.deltas import as_parameter
from infusion.gate import Gate
from infusion.inject import cross_attention_layers, inject, remove
from infusion.loss import masked_loss
from infusion.methods.infusion import Infusion
from infusion.training.learner import Learner
from infusion.training.trainer import ConceptTrainer, SaveConcept
from ldm.models.attention import Context
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError, naming


class ResidualBank(nn.Module):
    """The residual value embeddings of K concepts at one layer, float32 (K, C); each row of a batch has one of them.

    Args:
        residuals: (K, C), see `infusion.deltas.as_parameter`.
    """

    def __init__(self, residuals: Tensor) -> None:
        super().__init__()
        self.residuals = as_parameter(residuals)


@dataclass(frozen=True, eq=False)
class BankPass(CustomisedPass):
    """A customised pass over banks; each row has one residual of them.

    Attributes:
        chosen: (B,) int64, which residual each row has.
    """

    chosen: Tensor

    def residuals(self, layer: EditedCrossAttention) -> Tensor:
        return torch.stack([edit.residuals[self.chosen] for edit in layer.edits], 1)  # (B, 1, C)


class ManyTrainer(Learner):
    """K concepts on one base model. Injects their banks into the UNet for good.

    A batch has for each concept, by name, a batch as `ConceptTrainer` takes it, without a prior. Timesteps and noise of
    each concept are those that its own training with this seed draws.

    Args:
        sd: the base model, which is frozen.
        method: what is learned of each; its attention must be the foundation's.
        concepts: each has a `name` and a `superclass`; what else it has is for `data.many.ManyConcepts`, which
            checks the list.
        templates, gate, learning_rate, weight_decay, normalise_loss, seed, covariance: as for `ConceptTrainer`, the
            same for all concepts.

    Attributes:
        names: of the concepts, in the order of the banks' rows.
        parts: for each concept its own trainer, which encodes its prompts and describes it, and trains nothing.
        tensors: layer name -> bank, (K, C) float32.

    Raises:
        ValueError: attention "own"; what `ConceptTrainer` refuses for one of the concepts, which is named.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        method: Infusion,
        concepts: Sequence[Mapping[str, Any]],
        templates: Sequence[str],
        gate: Gate | None = None,
        learning_rate: float = 0.01,
        weight_decay: float = 0.01,
        normalise_loss: bool = False,
        seed: int = 0,
        covariance: InverseCovariance | None = None,
    ) -> None:
        super().__init__()
        if method.attention != "foundation":
            raise UserError(
                "many concepts share the foundation's attention: set attention: foundation, or train them apart"
            )
        self.learning_rate, self.weight_decay, self.normalise_loss = learning_rate, weight_decay, normalise_loss
        options = {"learning_rate": learning_rate, "weight_decay": weight_decay, "normalise_loss": normalise_loss}
        options |= {"gate": gate, "seed": seed, "covariance": covariance}
        self.names, self.parts = [], nn.ModuleList()
        for entry in concepts:
            with naming(f"concepts.{entry['name']}"):
                self.parts.append(ConceptTrainer(sd, method, entry["superclass"], templates, **options))
            self.names.append(entry["name"])
            remove(sd.unet)
        starts = [part.tensors for part in self.parts]
        self.tensors = {name: nn.Parameter(torch.stack([own[name].detach() for own in starts])) for name in starts[0]}
        layers = cross_attention_layers(sd.unet)
        widths = {name: layer.heads * layer.dim_head for name, layer in layers.items()}
        fixed = {name: torch.zeros(len(self.names), width) for name, width in widths.items()}
        inject(sd.unet, {name: ResidualBank(bank) for name, bank in (fixed | self.tensors).items()})

    @property
    def sd(self) -> StableDiffusion:
        """The base model, which all parts share."""
        return self.parts[0].sd

    def setup(self, stage: str) -> None:
        """Raises ValueError where gradients would be clipped by a norm, which the concepts would share."""
        if self.trainer.gradient_clip_val and self.trainer.gradient_clip_algorithm != "value":
            raise UserError("trainer.gradient_clip_val: the norm would be that of all concepts together: leave it out")
        for part in self.parts:
            part.trainer = self.trainer  # for the step that its draws depend on

    def training_step(self, batch: Mapping[str, Mapping[str, Any]], batch_idx: int) -> Tensor:
        """`Σ_k` of the concepts' losses; logs each, and their mean as `train/loss`."""
        losses, rows = self.losses(batch, batch_idx), sum(self._sizes(batch))
        total = torch.stack(list(losses.values())).sum()
        self.log("train/loss", total / len(losses), prog_bar=True, batch_size=rows)
        self.log_dict({f"loss/{name}": loss for name, loss in losses.items()}, batch_size=rows)
        return total

    def losses(self, batch: Mapping[str, Mapping[str, Any]], batch_idx: int) -> dict[str, Tensor]:
        """The masked loss of each concept by name, from one pass over the rows of all."""
        sizes, schedule = self._sizes(batch), self.sd.schedule
        latents = torch.cat([batch[name]["latents"] for name in self.names])  # (ΣB, 4, h, w)
        own = zip(self.parts, latents.split(sizes), strict=True)
        draws = [part.draw(rows, part.generator(batch_idx)) for part, rows in own]
        timesteps, noise = (torch.cat(rows) for rows in zip(*draws, strict=True))
        encoded = [part.encode(batch[name]["template"]) for name, part in zip(self.names, self.parts, strict=True)]
        contexts, gates = zip(*encoded, strict=True)
        context, gates = Context.cat(contexts), torch.cat(gates)  # gates are (ΣB, 1, L)
        if "sizes" in batch[self.names[0]]:
            context = replace(context, sizes=torch.cat([batch[name]["sizes"] for name in self.names]))
        noisy = schedule.add_noise(latents, noise, timesteps).to(context.text.dtype)
        chosen = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(latents.device)  # (ΣB,)
        tape: Tape = {}
        with torch.no_grad():
            self.sd.unet(noisy, timesteps, context.becomes(FoundationPass, gates=gates, tape=tape))
        strengths = torch.ones(1, device=noisy.device)
        own_residual = context.becomes(BankPass, tape=tape, strengths=strengths, chosen=chosen)
        prediction = self.sd.unet(noisy, timesteps, own_residual).split(sizes)
        target = schedule.target(latents, noise, timesteps).split(sizes)
        return {
            name: masked_loss(prediction[k], target[k], batch[name].get("mask"), self.normalise_loss)
            for k, name in enumerate(self.names)
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(self.tensors.values()), lr=self.learning_rate, weight_decay=self.weight_decay)

    def concept(self, name: str) -> Concept:
        """What has been learned of one concept so far, as its own training describes it.

        Raises:
            ValueError: its residuals are not finite.
        """
        k = self.names.index(name)
        return replace(self.parts[k].concept(), tensors={layer: bank[k] for layer, bank in self.tensors.items()})

    def _sizes(self, batch: Mapping[str, Mapping[str, Any]]) -> list[int]:
        return [len(batch[name]["latents"]) for name in self.names]


class SaveConcepts(SaveConcept):
    """As `SaveConcept`, for each concept of a `ManyTrainer`: `<name>/step=000500.safetensors`."""

    def write(self, module: ManyTrainer, folder: Path, name: str) -> None:
        """Raises ValueError, after the others are written, for concepts that are not finite; it names them."""
        diverged = []
        for one in module.names:
            try:
                concept = module.concept(one)
            except UserError as error:
                diverged.append(f"{one}: {error}")
                continue
            concept.save(folder / one / name)
        if diverged:
            raise UserError("; ".join(diverged))
