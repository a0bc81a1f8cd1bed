"""How good one step of a training is: what was gained in likeness against what was kept of the base model.

    gained  = (likeness − likeness of the base model) / (ceiling − likeness of the base model)
    kept    = LFD∅ / (LFD∅ + LFD)
    balance = 2 · gained · kept / (gained + kept)

Likeness is that of the identity network or, without one, CLIP-I; its ceiling is that of the photos among themselves.
LFD is that of prompts with the concept, around the concept. LFD∅ is the scale that LFD is read on: the same divergence
between the base model with the prompt and the base model with an empty one. So `kept` is ½ where the surroundings have
moved as far as if the prompt had not been read. The
harmonic mean is that of an F-score (van Rijsbergen 1979): neither makes up for a lack of the other. All of this is this
project's own definition. Seeds begin at `Options.seed`: a step is not chosen by the samples that a report measures.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infusion.metrics.measures import fidelity, wasserstein
from infusion.metrics.measures.fisher import Divergence, errors
from infusion.metrics.run.cache import Rows
from infusion.metrics.run.features import pooled_latents
from infusion.metrics.run.stages import Group, Stages, rows_of
from infusion.metrics.run.subject import Checkpoint
from ldm.util.cli import UserError

MEASURED = ("likeness", "base_likeness", "lfd", "empty_lfd")  # columns of `Trial.rows`


@dataclass(frozen=True)
class Trial:
    """One checkpoint, measured.

    Attributes:
        step: of its training.
        rows: sample by sample, in the order of `MEASURED`, (N, 4) float64.
        ceiling: likeness of the photos among themselves.
        w2, floor: Gaussian W2 of pooled latents from the base model's samples, and between two batches of those.
    """

    step: int
    rows: Tensor
    ceiling: float
    w2: float
    floor: float

    @property
    def balance(self) -> float:
        """In [0, 1]."""
        return balance(self.rows, self.ceiling)

    def as_dict(self) -> dict[str, float]:
        """For logs: the means, and what follows from them."""
        means = dict(zip(MEASURED, self.rows.mean(0).tolist(), strict=True))
        gained, kept = shares(self.rows, self.ceiling)
        found = {"step": self.step} | means | {"ceiling": self.ceiling, "w2": self.w2, "floor": self.floor}
        return found | {"gained": gained, "kept": kept, "balance": self.balance}


def shares(rows: Tensor, ceiling: float) -> tuple[float, float]:
    """`gained`, at most 1 and negative where likeness was lost, and `kept` in [0, 1]; rows as in `Trial`."""
    likeness, base, lfd, empty = rows.mean(0).tolist()
    return min((likeness - base) / max(ceiling - base, 1e-6), 1.0), empty / max(empty + lfd, 1e-30)


def balance(rows: Tensor, ceiling: float) -> float:
    """The harmonic mean of `shares`, 0 where nothing was gained."""
    gained, kept = shares(rows, ceiling)
    return 2 * gained * kept / (gained + kept) if gained > 0 else 0.0


class Balance:
    """Measures checkpoints of one training, on the same prompts, seeds and noise.

    Args:
        stages: steps of the base model, with a CLIPSeg and an identity network or a CLIP among the tools.
        prompts: with {} for the concept; sample i has the i-th, going round.
        superclass: the noun in place of {}.
        photos: of the concept, (P, 3, H, W) in [0, 1], at least 2.

    Raises:
        ValueError: fewer than 2 photos or samples.
    """

    def __init__(self, stages: Stages, prompts: tuple[str, ...], superclass: str, photos: Tensor) -> None:
        if stages.options.samples < 2:
            raise UserError(f"samples: must be at least 2, not {stages.options.samples}")
        self.stages = stages
        self.group = Group("balance", prompts, superclass, stages.options.seed)
        self.network = stages.tools.first_of("identity", "clip")
        self.photos = stages.features(rows_of(photos), self.network)
        self.ceiling = fidelity.among(self.photos).mean().item()
        self.base = stages.samples(self.group)
        self.regions = stages.regions(self.base, superclass)
        self.base_likeness = self._likeness(self.base)
        self.empty = self._empty()
        self.floor = self._distance(stages.samples(replace(self.group, first=self.group.first + stages.options.block)))

    def measure(self, checkpoint: Checkpoint) -> Trial:
        """One checkpoint's figures."""
        ours = self.stages.samples(self.group, checkpoint)
        lfd = self.stages.divergence(self.group, self.base, checkpoint, self.regions).values.mean(1)
        rows = torch.stack([self._likeness(ours), self.base_likeness, lfd, self.empty], 1)  # (N, 4)
        return Trial(checkpoint.concept.steps, rows, self.ceiling, self._distance(ours), self.floor)

    def _likeness(self, samples: Rows) -> Tensor:
        return fidelity.pairwise(self.stages.features(samples, self.network), self.photos)  # (N,)

    def _distance(self, samples: Rows) -> float:
        return wasserstein.gaussian(pooled_latents(self.base["latents"]), pooled_latents(samples["latents"]))

    def _empty(self) -> Tensor:
        """LFD∅ of each sample, (N,)."""
        sd, options, found = self.stages.sd, self.stages.options, []
        for start in range(0, options.samples, options.batch_size):
            rows = range(start, min(start + options.batch_size, options.samples))
            prompts = self.group.plain(rows)
            with sd.autocast(options.precision):
                part = errors(
                    base=sd.guided(prompts, scale=1.0),
                    customised=sd.guided([""] * len(prompts), scale=1.0),
                    latents=self.base["latents"][list(rows)].to(sd.device),
                    schedule=sd.schedule,
                    seeds=self.group.seeds(rows),
                    strata=options.strata,
                    weighting=options.weighting,
                    regions=self.regions["regions"][list(rows)],
                )
            found.append(part)
        return Divergence.cat(found).values.mean(1)
