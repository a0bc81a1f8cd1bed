"""The cached steps of an evaluation: latents, features, regions, errors. Each row is one prompt and one seed.

Row i of a group has its i-th prompt, going round, and the seed `options.seed + i`, in every stage and for every
concept: samples are compared pair by pair, and methods on common random numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infusion.gate import fingerprint
from infusion.inject import unedited
from infusion.metrics.measures.estimate import bootstrap
from infusion.metrics.measures.fisher import Divergence, errors
from infusion.metrics.run.cache import Cache, Rows
from infusion.metrics.run.features import pooled_latents
from infusion.metrics.run.options import Options, Tools
from infusion.metrics.run.protocol import plain
from infusion.metrics.run.subject import Checkpoint, ExactMeasures
from infusion.sampling.customised import Customised
from infusion.sampling.settings import Settings
from ldm.diffusion.sampler import Denoiser
from ldm.models.autoencoder import coverage
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError
from ldm.util.templates import fill

OUTSIDE = 0.25  # share of a place of the latents that a mask covers; below it the place is outside


@dataclass(frozen=True)
class Group:
    """Prompts and seeds of samples.

    Attributes:
        name: a group of `infusion.metrics.run.protocol`, or "floor" for another block of seeds.
        prompts: gone round; with {} for the concept.
        superclass: what the base model has in place of {}.
        first: seed of the first sample.
    """

    name: str
    prompts: tuple[str, ...]
    superclass: str
    first: int

    def templates(self, rows: Sequence[int]) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in rows]

    def plain(self, rows: Sequence[int]) -> list[str]:
        return [plain(template, self.superclass) for template in self.templates(rows)]

    def seeds(self, rows: Sequence[int]) -> list[int]:
        return [self.first + i for i in rows]


@dataclass(frozen=True)
class Stages:
    """The steps for one base model."""

    sd: StableDiffusion
    options: Options
    tools: Tools
    cache: Cache

    def samples(self, group: Group, checkpoint: Checkpoint | None = None, count: int | None = None) -> Rows:
        """`latents` (N, C, h, w) of the base model, or of the concept, for a group's prompts and seeds."""
        count = self.options.samples if count is None else count
        what = {"base": self.sd.identity, "first": group.first, **self.options.sampling()}
        if checkpoint is None:
            what |= {"prompts": [plain(prompt, group.superclass) for prompt in group.prompts]}
        else:
            what |= {"prompts": list(group.prompts), "concept": checkpoint.sha256, **self._editing()}

        def make(rows: range) -> dict[str, Tensor]:
            with self._denoiser(group, rows, checkpoint, self.options.scale) as denoise, self._half():
                how = {"steps": self.options.steps, "sampler": self.options.sampler}
                latents = self.sd.draw_latents(denoise, group.seeds(rows), **how)
            if odd := [row for row, drawn in zip(rows, latents, strict=True) if not drawn.isfinite().all()]:
                raise UserError(
                    f"{group.templates(odd)[0]!r}, seed {group.seeds(odd)[0]}: the sample has numbers that are not "
                    "finite; measure with --precision full, or another concept"
                )
            return {"latents": latents}

        title = f"{group.name}: {'base model' if checkpoint is None else checkpoint.concept.method} samples"
        return self._rows("samples" if checkpoint else "base", what, count, make, title)

    def images(self, samples: Rows, rows: range | list[int] | None = None) -> Tensor:
        """Decoded samples (N, 3, H, W) in [0, 1], all or some, on the CPU."""
        latents = samples["latents"] if rows is None else samples["latents"][list(rows)]
        parts = latents.split(self.options.batch_size)
        return torch.cat([self.sd.decode(part.to(self.sd.device)).cpu() for part in parts])

    def features(self, samples: Rows, name: str) -> Tensor:
        """Features (N, D) of samples, by the backbone `clip` or `dino`, at unit length in float64."""
        backbone = self.tools.backbone(name)
        what = {"of": samples.key, "backbone": self.tools.hashes.get(name, backbone.name)}

        def make(rows: range) -> dict[str, Tensor]:
            return {"features": backbone(self.images(samples, rows))}

        rows = self._rows("features", what, len(samples), make, f"{name} features")["features"]
        return F.normalize(rows.double(), dim=1)  # float32 has it to 1e-7, as far as the same picture would be apart

    def interval(
        self, distance: Callable[[Tensor, Tensor], float], name: str, first: Rows, second: Rows
    ) -> dict[str, float]:
        """`value` of a distance between the features of two batches of samples, `low` and `high`: 95 % by bootstrap.

        Rows of one prompt are drawn together.

        Args:
            name: of the features: `clip`, `dino`, or `latent` for pooled latents.
        """

        def features(samples: Rows) -> Tensor:
            return pooled_latents(samples["latents"]) if name == "latent" else self.features(samples, name)

        what = {"distance": distance.__name__, "of": [first.key, second.key], "samples": [len(first), len(second)]}
        what |= {"features": name, "backbone": self.tools.hashes.get(name, ""), "resamples": self.options.resamples}

        def make() -> dict[str, float]:
            clouds = features(first), features(second)
            low, high = bootstrap(distance, *clouds, paired=True, resamples=self.options.resamples)
            return {"value": distance(*clouds), "low": low, "high": high}

        return self.cache.figures("interval", what, make)

    def exact(self, group: Group, ours: Rows, base: Rows, measures: ExactMeasures) -> dict[str, dict]:
        """Exact figures of samples with the concept and without."""
        templates = group.templates(range(len(ours)))
        what = {"of": [ours.key, base.key], "templates": templates, "concept": measures.name}
        what |= {name: self.tools.hashes.get(name, "") for name in ("classifier", "clipseg")}

        def make() -> dict[str, dict]:
            return measures.measure(templates, group.superclass, self.images(ours), self.images(base))

        return self.cache.figures("exact", what, make)

    def regions(self, samples: Rows, superclass: str) -> Rows:
        """`regions` (N, 1, h, w), 0 or 1, of the superclass in the base model's samples, by `to_regions`."""
        prompts = [fill(template, [superclass]) for template in self.tools.mask_prompts]
        what = {"of": samples.key, "prompts": prompts, "clipseg": self.tools.hashes.get("clipseg", "")}
        what |= {"outside_below": OUTSIDE}
        size = tuple(samples["latents"].shape[2:])

        def make(rows: range) -> dict[str, Tensor]:
            masks = self.tools.clipseg.masks(self.images(samples, rows), prompts)  # (n, S, S)
            return {"regions": to_regions(masks, size)}

        return self._rows("regions", what, len(samples), make, "regions")

    def divergence(self, group: Group, base: Rows, checkpoint: Checkpoint, regions: Rows | None = None) -> Divergence:
        """LFD's errors of a concept on a group; `base` are the base model's samples of it."""
        options = self.options
        what = {"of": base.key, "prompts": list(group.prompts), "concept": checkpoint.sha256, **self._editing()}
        what |= {"strata": options.strata, "weighting": options.weighting, "precision": options.precision}
        what |= {"regions": regions.key if regions else None}

        def make(rows: range) -> dict[str, Tensor]:
            latents = base["latents"][list(rows)].to(self.sd.device)
            outside = None if regions is None else regions["regions"][list(rows)]
            with ExitStack() as stack:
                foundation = stack.enter_context(self._denoiser(group, rows, None, 1.0))
                customised = stack.enter_context(self._denoiser(group, rows, checkpoint, 1.0))
                stack.enter_context(self._half())

                def untouched(noisy: Tensor, timesteps: Tensor) -> Tensor:
                    with unedited(self.sd.unet):
                        return foundation(noisy, timesteps)

                found = errors(
                    *(untouched, customised, latents, self.sd.schedule, group.seeds(rows)),
                    *(options.strata, options.weighting, outside),
                )
            return {"values": found.values, "timesteps": found.timesteps}

        title = f"{group.name}: {checkpoint.concept.method} LFD, step {checkpoint.concept.steps}"
        rows = self._rows("errors", what, len(base), make, title)
        return Divergence(rows["values"], rows["timesteps"], self.sd.schedule.timesteps)

    def _rows(self, stage: str, what: Mapping[str, object], count: int, make: object, title: str) -> Rows:
        return self.cache.rows(stage, what, count, self.options.batch_size, make, title)

    def _editing(self) -> dict[str, object]:
        return self.options.editing() | {"covariance": fingerprint(self.tools.inverse_covariance)}

    def _half(self) -> AbstractContextManager:
        return self.sd.autocast(self.options.precision)

    @contextmanager
    def _denoiser(self, group: Group, rows: range, checkpoint: Checkpoint | None, scale: float) -> Iterator[Denoiser]:
        if checkpoint is None:
            yield self.sd.guided(group.plain(rows), scale=scale)
            return
        settings = Settings(scale=scale, **self.options.editing())
        with Customised(self.sd, [checkpoint.concept], settings, self.tools.inverse_covariance) as customised:
            yield customised(group.templates(rows))


def to_regions(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (N, S, S) at least 0, each divided by its maximum, as regions (N, 1, h, w) of latents, 0 or 1.

    A place is outside, 0, where the mask covers less than `OUTSIDE` of it, and counts in full; any other is the
    object's and does not count. Shares would let the object's edge count as its surroundings: a method that changes the
    object alone would seem to change what is around it.
    """
    masks = masks / masks.amax((1, 2), keepdim=True).clamp_min(1e-6)
    return (coverage(masks[:, None], size) >= OUTSIDE).to(masks)
