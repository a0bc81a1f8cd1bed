"""Every figure of one row: of a concept, of words in its place, or of pictures that were drawn elsewhere.

    stages in a cache  ->  figures {metric: value, stderr, n, …}, curves, pictures

A figure may have with it: `base`, the same measurement of the base model; `ceiling`, of the concept's own photos or of
the concept itself, and `ceiling_decoded`, of the photos through the autoencoder; `floor`, of an LFD that of the method
before training, of a distance that of two batches of the base model; `low` and `high`, a bootstrap interval of 95 %.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from infusion.gate import IDENTITY
from infusion.metrics.measures import estimate, fidelity, wasserstein
from infusion.metrics.measures.fisher import Divergence
from infusion.metrics.measures.kid import kid
from infusion.metrics.report.gallery import SHOWN, gallery
from infusion.metrics.run.cache import Cache, Rows
from infusion.metrics.run.features import TextBackbone, ZeroShot
from infusion.metrics.run.options import (
    CLOUDS,
    CONCEPT,
    HINTS,
    LIKENESS,
    PICTURES,
    WORDS,
    Options,
    Tools,
    lacks,
    metrics_of,
)
from infusion.metrics.run.protocol import CONTEXT, GROUPS, PLAIN, Protocol, plain
from infusion.metrics.run.stages import Group, Stages, rows_of
from infusion.metrics.run.subject import Checkpoint, Subject, untrained
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError

FLOOR = "floor"
NORMAL = 3.92  # widths of a normal law's 95 % interval, in standard deviations
OF_SAMPLES = (*CLOUDS, *LIKENESS, "clip_t", "noun", "div", "exact")  # metrics of samples of the concept
Figure = dict[str, object]


def evaluate(
    sd: StableDiffusion, subject: Subject, protocol: Protocol, options: Options, cache: Cache, tools: Tools
) -> dict:
    """Measure one row.

    Args:
        sd: the base model.
        subject: a concept, words, or pictures, and what is known of the concept.
        protocol: the prompts; pictures have their own.
        options: what to measure and how.
        cache: keeps every step; the base model's are shared by all rows.
        tools: the networks that measure.

    Returns:
        `label` and the rest of `Subject.about`; `figures`, metric -> value, stderr, n, settings and what they are read
        against; `timesteps` and `training`, LFD's curves by group; `pictures`, tensors for the report.

    Raises:
        UserError: a metric lacks its network, its photos or samples; whatever `Customised` refuses.
    """
    check(subject, protocol, options, tools)
    return Evaluation(Stages(sd, options, tools, cache), subject, protocol).run()


def check(subject: Subject, protocol: Protocol, options: Options, tools: Tools) -> None:
    """Raises UserError, which names a flag, for a metric that cannot be measured."""
    for name in options.metrics:
        if complaint := lacks(name, subject, tools.there):
            raise UserError(complaint)
        reads = name == "clip_t" or (name == "noun" and tools.classifier is None)
        if reads and not isinstance(tools.clip, TextBackbone):
            raise UserError(f"--clip: {tools.clip.name} encodes no texts, and {name} needs them: name a CLIP")
    if options.crop and tools.clipseg is None:
        raise UserError(f"{HINTS['clipseg']}; --crop needs it")
    flag, things, count, prompts = "--samples", "samples", options.samples, len(protocol.concept)
    if subject.pictures:
        flag, things, count = "--pictures", f"pictures in {subject.pictures.folder}", len(subject.pictures.images)
    for name, least in CLOUDS.items():
        if name in options.metrics and count < least:
            raise UserError(f"{flag}: a distance between clouds ({name}) needs at least {least} {things}, not {count}")
    if "div" in options.metrics and not subject.pictures and count <= prompts:
        raise UserError(
            f"--samples: div compares samples of one prompt, and of {prompts} prompts none is drawn twice with "
            f"{count}: take at least {prompts + 1}, better {2 * prompts}, or leave div out of --metrics"
        )


class Evaluation:
    """The figures of one subject; `run` gives them all. See `evaluate`."""

    def __init__(self, stages: Stages, subject: Subject, protocol: Protocol) -> None:
        self.stages, self.subject, self.protocol = stages, subject, protocol
        self.options, self.tools = stages.options, stages.tools
        self.superclass, self.metrics = subject.superclass, metrics_of(subject, self.options.metrics)
        self.count = self.options.samples if subject.pictures is None else len(subject.pictures.images)
        needed = [name for name in PLAIN if {"lfd", "drift"} & set(self.metrics) or name == "superclass"]
        prompts = {name: tuple(protocol.prompts(name, self.superclass)) for name in needed}
        prompts[CONTEXT] = protocol.concept if subject.pictures is None else subject.pictures.prompts
        first, other = self.options.first_seed, self.options.other_seed
        self.groups = {name: Group(name, own, self.superclass, first) for name, own in prompts.items()}
        self.groups[FLOOR] = Group(FLOOR, prompts[CONTEXT], self.superclass, other)

    def run(self) -> dict:
        measures = {"lfd": self._lfd, "w2": self._w2, "kid": self._kid, "clip_t": self._clip_t, "noun": self._noun}
        measures |= {"pres": self._pres, "div": self._div, "drift": self._drift, "exact": self._exact}
        figures: dict[str, Figure] = {}
        for metric in self.metrics:
            figures |= {metric: self._likeness(LIKENESS[metric])} if metric in LIKENESS else measures[metric]()
        for figure in figures.values():
            figure["settings"] = self._settings() | figure.pop("settings", {})
        result = {"label": self.subject.label, **self.subject.about(), "figures": figures}
        return result | {"timesteps": self._timesteps(), "training": self._training(), "pictures": self._pictures()}

    def _settings(self) -> dict[str, object]:
        """What produced every figure, beside models, concept and prompts."""
        settings = self.options.sampling() | {"first_seed": self.options.first_seed}
        if self.subject.kind == CONCEPT:
            covariance = self.subject.concept.covariance
            settings |= self.options.editing() | ({} if covariance == IDENTITY else {"covariance": covariance})
        return settings

    # --- overfitting --------------------------------------------------------------------------------------------------

    def _divergence(self, name: str, checkpoint: Checkpoint) -> Divergence:
        """LFD of a group at one checkpoint."""
        group = self.groups[name]
        base = self.stages.samples(group)
        regions = self.stages.regions(base, group.superclass) if name == CONTEXT else None
        return self.stages.divergence(group, base, checkpoint, regions)

    @cached_property
    def _untrained(self) -> Checkpoint:
        return untrained(self.stages.sd, self.subject.concept)

    def _lfd(self) -> dict[str, Figure]:
        options, figures = self.options, {}
        settings = {"strata": options.strata, "weighting": options.weighting}
        settings |= {"x_0": f"base samples, guidance {options.scale:g}", "predictions": "without guidance"}
        for name in GROUPS:
            found, floor = (self._divergence(name, one).estimate() for one in (self.subject.last, self._untrained))
            figures[f"lfd_{name}"] = found.as_dict() | {"floor": floor.as_dict(), "settings": settings}
        return figures

    def _timesteps(self) -> dict[str, list]:
        """LFD of every group over the noise schedule."""
        if "lfd" not in self.metrics:
            return {}
        curves = {name: self._divergence(name, self.subject.last).curve() for name in GROUPS}
        return {name: [{"timestep": t} | one.as_dict() for t, one in curve] for name, curve in curves.items()}

    def _training(self) -> dict[str, list]:
        """LFD of every checkpoint, for the groups of `options.curve`."""
        checkpoints = self.subject.checkpoints
        if "lfd" not in self.metrics or len(checkpoints) < 2:
            return {}
        return {
            name: [
                {"step": one.concept.steps} | self._divergence(name, one).estimate().as_dict() for one in checkpoints
            ]
            for name in self.options.curve
        }

    def _w2(self) -> dict[str, Figure]:
        base, ours, other = (self._samples(name) for name in ("base", "ours", FLOOR))
        figures = {}
        for name, features in (("latent", "latents pooled to 4 × 4"), ("clip", "CLIP image embeddings")):
            for suffix, distance in (("", wasserstein.gaussian), ("_exact", wasserstein.exact)):
                figure, floor = (self._interval(distance, name, base, rows) for rows in (ours, other))
                settings = {"features": features, "estimator": distance.__name__, "resamples": self.options.resamples}
                settings |= self._dimensions(base, name)
                figures[f"w2_{name}{suffix}"] = figure | {"floor": floor, "settings": settings}
        return figures

    def _kid(self) -> dict[str, Figure]:
        base, ours, other = (self.stages.features(self._samples(name), "clip") for name in ("base", "ours", FLOOR))
        settings = {"features": "CLIP image embeddings", "kernel": "(xᵀy / D + 1)³, unbiased; error by jackknife"}
        settings |= self._dimensions(base, "clip")
        return {"kid": kid(base, ours).as_dict() | {"floor": kid(base, other).as_dict(), "settings": settings}}

    def _dimensions(self, rows: Rows | Tensor, name: str) -> dict[str, int]:
        """N and D of a cloud: W2 is biased upwards the more, the further N is below D."""
        width = 16 * self.stages.latents(rows).shape[1] if name == "latent" else self.tools.backbone(name).width
        return {"samples": len(rows), "dimensions": width}

    def _interval(self, distance: Callable[[Tensor, Tensor], float], name: str, first: Rows, second: Rows) -> Figure:
        """A distance between samples' features, its interval, and the standard error that a normal law has for that."""
        found = self.stages.interval(distance, name, first, second)
        return {"value": found["value"], "stderr": (found["high"] - found["low"]) / NORMAL, "n": len(second), **found}

    def _drift(self) -> dict[str, Figure]:
        share = -(-self.options.samples // len(PLAIN))  # of each group, as many or one more
        drifts = []
        for name in PLAIN:
            base, ours = (self._samples(which, name, share) for which in ("base", "ours"))
            drifts.append(fidelity.drift(self.stages.features(base, "clip"), self.stages.features(ours, "clip")))
        return {"drift": estimate.mean(torch.cat(drifts)).as_dict() | {"settings": {"backbone": self.tools.clip.name}}}

    # --- fidelity, alignment, diversity -------------------------------------------------------------------------------

    def _beside_base(self, measure: Callable[[Rows], Tensor], group: str = CONTEXT) -> Figure:
        """The mean of what is measured of samples of a group, and that of the base model's."""
        ours, base = (estimate.mean(measure(self._samples(which, group))).as_dict() for which in ("ours", "base"))
        return ours | {"base": base}

    def _likeness(self, network: str) -> Figure:
        """Samples against the photos; beside the base model's, and the photos' own, as they are and decoded."""
        subject = self.superclass if self.options.crop and network != "identity" else ""
        own, photos, figure = self._against_photos(network, CONTEXT, subject)
        decoded = self.stages.features(self.stages.decoded(own), network, subject)
        figure["ceiling_decoded"] = estimate.mean(fidelity.among(photos, decoded)).as_dict()
        if subject:
            figure["settings"] |= {"crop": f"square around CLIPSeg's mask of {subject!r}, with 10 % on each side"}
        return figure

    def _pres(self) -> dict[str, Figure]:
        _, _, figure = self._against_photos(self.tools.first_of("dino", "clip"), "superclass")
        return {"pres": figure}

    def _against_photos(self, network: str, group: str, subject: str = "") -> tuple[Rows, Tensor, Figure]:
        """The photos, their features (P, D), and the likeness of samples of a group to them."""
        own = rows_of(self.subject.photos)
        photos = self.stages.features(own, network, subject)

        def like(rows: Rows) -> Tensor:
            return fidelity.pairwise(self.stages.features(rows, network, subject), photos)

        settings = {"backbone": self.tools.backbone(network).name, "photos": len(photos)}
        ceiling = estimate.mean(fidelity.among(photos)).as_dict()
        return own, photos, self._beside_base(like, group) | {"ceiling": ceiling, "settings": settings}

    def _noun(self) -> dict[str, Figure]:
        """The share of samples in which a classifier still sees the superclass."""
        reader, noun = self.tools.classifier, self.superclass
        if reader is None or noun not in reader.nouns:
            reader = ZeroShot(self.tools.clip, (noun, *self.protocol.neighbours_of(noun)))
        rows = {which: self._samples(which) for which in ("ours", "base")}
        rows |= {"ceiling": rows_of(self.subject.photos)} if self.subject.photos is not None else {}
        shares = {
            which: estimate.rate(self.stages.sees(samples, reader, noun)).as_dict() for which, samples in rows.items()
        }
        settings = {"classifier": reader.name, "nouns": len(reader.nouns)}
        return {"noun": shares.pop("ours") | shares | {"settings": settings}}

    def _clip_t(self) -> dict[str, Figure]:
        group, clip = self.groups[CONTEXT], self.tools.clip
        texts = clip.texts([plain(prompt, group.superclass) for prompt in group.prompts]).cpu()
        texts = texts[[i % len(texts) for i in range(self.count)]]
        figure = self._beside_base(lambda rows: fidelity.alignment(self.stages.features(rows, "clip"), texts))
        return {"clip_t": figure | {"settings": {"backbone": clip.name}}}

    def _div(self) -> dict[str, Figure]:
        templates = self.groups[CONTEXT].templates(range(self.count))
        rows = [i for i, template in enumerate(templates) if templates.count(template) > 1]
        if not rows:  # of pictures, each of a prompt of its own
            return {}
        groups, network = [templates[i] for i in rows], self.tools.first_of("lpips", "dino", "clip")

        def spread(samples: Rows) -> Tensor:
            if network == "lpips":
                return fidelity.lpips_diversity(self.stages.images(samples, rows), groups, self.tools.lpips)
            return fidelity.diversity(self.stages.features(samples, network)[rows], groups)

        said = "LPIPS" if network == "lpips" else f"1 − cos of {self.tools.backbone(network).name}"
        return {"div": self._beside_base(spread) | {"settings": {"distance": said}}}

    def _exact(self) -> dict[str, Figure]:
        ours, base = (self._samples(which) for which in ("ours", "base"))
        return self.stages.exact(self.groups[CONTEXT], ours, base, self.subject.exact)

    def _pictures(self) -> dict[str, object]:
        few = not set(OF_SAMPLES) & set(self.metrics) and self.subject.kind != PICTURES
        count = min(self.count, 2 * SHOWN) if few else self.count
        base, ours = (self._samples(which, count=count) for which in ("base", "ours"))
        return gallery(self.stages, self.groups[CONTEXT], base, ours, self.subject.photos)

    def _samples(self, which: str, group: str = CONTEXT, count: int | None = None) -> Rows:
        """Samples: `ours` of the concept, of its words or drawn elsewhere, the `base` model's, or of the `floor`."""
        subject, count = self.subject, self.count if count is None else count
        if which == FLOOR:
            return self.stages.samples(self.groups[FLOOR], count=count)
        if which == "base":
            return self.stages.samples(self.groups[group], count=count)
        if subject.kind == PICTURES:
            return rows_of(subject.pictures.images)
        if subject.kind == WORDS:
            return self.stages.samples(self.groups[group].told(subject.described), count=count)
        return self.stages.samples(self.groups[group], subject.last, count)
