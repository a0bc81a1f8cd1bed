"""The cached steps of an evaluation: latents, features, regions, errors. Each row is one prompt and one seed.

Row i of a group has its i-th prompt, going round, and the seed `group.first + i`, in every stage and for every concept:
samples are compared pair by pair, and methods on common random numbers. Rows of pictures that were drawn elsewhere, and
of photos, hold `images` in place of `latents`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from infusion.gate import fingerprint
from infusion.inject import unedited
from infusion.metrics.measures.estimate import bootstrap
from infusion.metrics.measures.fisher import Divergence, errors
from infusion.metrics.run.cache import Cache, Rows
from infusion.metrics.run.features import NounReader, crop_to, pooled_latents
from infusion.metrics.run.options import Options, Tools
from infusion.metrics.run.protocol import plain
from infusion.metrics.run.subject import Checkpoint, ExactMeasures
from infusion.metrics.run.subject import fingerprint as fingerprint_of
from infusion.sampling.customised import Customised
from infusion.sampling.settings import Settings
from ldm.diffusion.sampler import Denoiser
from ldm.models.autoencoder import coverage
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError
from ldm.util.templates import fill

ARTICLE = re.compile(r"\s*(an?|the)\s+", re.IGNORECASE)  # before the words that tell a concept
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

    def told(self, words: str) -> "Group":
        """The same prompts and seeds with words, "a striped blue dog", in place of {}, which has its own article."""
        words = ARTICLE.sub("", words, count=1)
        return replace(self, prompts=tuple(plain(prompt, words) for prompt in self.prompts))


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
                latents = self.sd.draw_latents(
                    denoise, group.seeds(rows), steps=self.options.steps, sampler=self.options.sampler
                )
            if odd := [row for row, drawn in zip(rows, latents, strict=True) if not drawn.isfinite().all()]:
                raise UserError(
                    f"{group.templates(odd)[0]!r}, seed {group.seeds(odd)[0]}: the sample has numbers that are not "
                    "finite; measure with --precision full, or another concept"
                )
            return {"latents": latents}

        title = f"{group.name}: {'base model' if checkpoint is None else checkpoint.concept.method} samples"
        return self._rows("samples" if checkpoint else "base", what, count, make, title)

    def images(self, samples: Rows, rows: range | list[int] | None = None) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] of rows, decoded where these are latents, all or some, on the CPU."""
        rows = range(len(samples)) if rows is None else rows
        if "images" in samples.tensors:
            return samples["images"][list(rows)]
        parts = samples["latents"][list(rows)].split(self.options.batch_size)
        return torch.cat([self.sd.decode(part.to(self.sd.device)).cpu() for part in parts])

    def latents(self, samples: Rows) -> Tensor:
        """Latents (N, C, h, w) of rows, encoded where these are images, on the CPU."""
        if "latents" in samples.tensors:
            return samples["latents"]
        weight = next(self.sd.vae.parameters())

        def make(rows: range) -> dict[str, Tensor]:
            images = samples["images"][list(rows)].to(weight)
            return {"latents": self.sd.vae.encode(images * 2 - 1).float()}

        what = {"of": samples.key, "base": self.sd.identity}
        return self._rows("encoded", what, len(samples), make, "encoding")["latents"]

    def decoded(self, samples: Rows) -> Rows:
        """`images` of the same pictures through the autoencoder, there and back."""
        latents = self.latents(samples)

        def make(rows: range) -> dict[str, Tensor]:
            return {"images": self.sd.decode(latents[list(rows)].to(self.sd.device))}

        what = {"of": samples.key, "base": self.sd.identity}
        return self._rows("decoded", what, len(samples), make, "decoding")

    def features(self, samples: Rows, name: str, subject: str = "") -> Tensor:
        """Features (N, D) of pictures, at unit length in float64.

        Args:
            name: of the backbone among the tools.
            subject: the noun of what is cropped to before, by CLIPSeg's mask; "" takes whole pictures.
        """
        backbone = self.tools.backbone(name)
        what = {"of": samples.key, "backbone": self.tools.hashes.get(name, backbone.name)}
        prompts = self._mask_prompts(subject) if subject else []
        what |= {"crop": prompts, "clipseg": self.tools.hashes.get("clipseg", "")} if subject else {}

        def make(rows: range) -> dict[str, Tensor]:
            images = self.images(samples, rows)
            if subject:
                images = crop_to(images, self.tools.clipseg.masks(images, prompts))
            return {"features": backbone(images)}

        rows = self._rows("features", what, len(samples), make, f"{name} features")["features"]
        return F.normalize(rows.double(), dim=1)  # float32 has it to 1e-7, as far as the same picture would be apart

    def sees(self, samples: Rows, reader: NounReader, noun: str) -> list[bool]:
        """In which pictures a classifier sees a noun."""
        what = {"of": samples.key, "noun": noun, "reader": reader.name, "nouns": list(reader.nouns)}
        what |= {name: self.tools.hashes.get(name, "") for name in ("classifier", "clip")}

        def make(rows: range) -> dict[str, Tensor]:
            return {"hits": torch.tensor(reader.sees(self.images(samples, rows), noun))}

        return self._rows("nouns", what, len(samples), make, "nouns")["hits"].tolist()

    def interval(
        self, distance: Callable[[Tensor, Tensor], float], name: str, first: Rows, second: Rows
    ) -> dict[str, float]:
        """`value` of a distance between the features of two batches of samples, `low` and `high`: 95 % by bootstrap.

        Rows of one prompt are drawn together.

        Args:
            name: of the features: `clip`, `dino`, or `latent` for pooled latents.
        """

        def features(samples: Rows) -> Tensor:
            return pooled_latents(self.latents(samples)) if name == "latent" else self.features(samples, name)

        what = {"distance": distance.__name__, "of": [first.key, second.key], "samples": [len(first), len(second)]}
        what |= {"features": name, "backbone": self.tools.hashes.get(name, ""), "resamples": self.options.resamples}

        def make() -> dict[str, float]:
            clouds = features(first), features(second)
            low, high = bootstrap(distance, *clouds, resamples=self.options.resamples)
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
        prompts = self._mask_prompts(superclass)
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
                    base=untouched,
                    customised=customised,
                    latents=latents,
                    schedule=self.sd.schedule,
                    seeds=group.seeds(rows),
                    strata=options.strata,
                    weighting=options.weighting,
                    regions=outside,
                )
            return {"values": found.values, "timesteps": found.timesteps}

        title = f"{group.name}: {checkpoint.concept.method} LFD, step {checkpoint.concept.steps}"
        rows = self._rows("errors", what, len(base), make, title)
        return Divergence(rows["values"], rows["timesteps"], self.sd.schedule.timesteps)

    def _mask_prompts(self, noun: str) -> list[str]:
        return [fill(template, [noun]) for template in self.tools.mask_prompts]

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


def rows_of(images: Tensor) -> Rows:
    """Images (N, 3, H, W) in [0, 1] that no model here has drawn, as rows."""
    return Rows(f"images-{fingerprint_of(images)}", {"images": images})


def to_regions(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (N, S, S) at least 0, each divided by its maximum, as regions (N, 1, h, w) of latents, 0 or 1.

    A place is outside, 0, where the mask covers less than `OUTSIDE` of it, and counts in full; any other is the
    object's and does not count. Shares would let the object's edge count as its surroundings: a method that changes the
    object alone would seem to change what is around it.
    """
    masks = masks / masks.amax((1, 2), keepdim=True).clamp_min(1e-6)
    return (coverage(masks[:, None], size) >= OUTSIDE).to(masks)
