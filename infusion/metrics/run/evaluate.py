"""Every figure of one concept, with what each is read against.

    stages in a cache  ->  figures {metric: value, stderr, n, …}, curves, pictures

A figure may have with it: `base`, the same measurement of the base model; `ceiling`, of the concept's own photos or of
the concept itself; `floor`, of two batches of the base model; `low` and `high`, a bootstrap interval of 95 %.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from infusion.gate import IDENTITY
from infusion.metrics.measures import estimate, fidelity, wasserstein
from infusion.metrics.measures.fisher import Divergence
from infusion.metrics.report.gallery import SHOWN, gallery
from infusion.metrics.run.cache import Cache, Rows
from infusion.metrics.run.options import OF_PHOTOS, Options, Tools
from infusion.metrics.run.protocol import CONTEXT, GROUPS, PLAIN, Protocol, plain
from infusion.metrics.run.stages import Group, Stages
from infusion.metrics.run.subject import Subject
from ldm.pipeline import StableDiffusion
from ldm.util.cli import UserError

FLOOR = "floor"
NORMAL = 3.92  # widths of a normal law's 95 % interval, in standard deviations
OF_SAMPLES = ("w2", "clip_t", "clip_i", "dino", "div", "exact")  # metrics of samples of the concept
Figure = dict[str, object]


def evaluate(
    sd: StableDiffusion, subject: Subject, protocol: Protocol, options: Options, cache: Cache, tools: Tools
) -> dict:
    """Measure one concept.

    Args:
        sd: the base model.
        subject: the concept and what is known of it.
        protocol: the prompts.
        options: what to measure and how.
        cache: keeps every step; the base model's are shared by all concepts.
        tools: the networks that measure.

    Returns:
        `label` and the rest of `Subject.about`; `figures`, metric -> value, stderr, n, settings and what they are read
        against; `timesteps` and `training`, LFD's curves by group; `pictures`, tensors for the report.

    Raises:
        ValueError: a metric lacks its network, its photos or samples; whatever `Customised` refuses.
    """
    check(subject, protocol, options, tools)
    return Evaluation(sd, subject, protocol, options, cache, tools).run()


def check(subject: Subject, protocol: Protocol, options: Options, tools: Tools) -> None:
    """Raises ValueError, which names a flag, for a metric that cannot be measured."""
    tools.check(options)
    prompts, samples = len(protocol.concept), options.samples
    if options.wants("div") and samples <= prompts:
        raise UserError(
            f"--samples: div compares samples of one prompt, and of {prompts} prompts none is drawn twice with "
            f"{samples}: take at least {prompts + 1}, better {2 * prompts}, or leave div out of --metrics"
        )
    if subject.photos is None and (lacking := [name for name in OF_PHOTOS if options.wants(name)]):
        raise UserError(f"--images: {lacking[0]} compares with the concept's photos; name their folder")
    if subject.exact is None and options.wants("exact"):
        raise UserError(f"--concept: exact figures are of the pocket world's own concepts; which is {subject.label}?")


class Evaluation:
    """The figures of one subject; `run` gives them all. See `evaluate`."""

    def __init__(
        self, sd: StableDiffusion, subject: Subject, protocol: Protocol, options: Options, cache: Cache, tools: Tools
    ) -> None:
        self.subject, self.options, self.tools = subject, options, tools
        self.stages = Stages(sd, options, tools, cache)
        superclass = subject.concept.superclass
        needed = [CONTEXT] + [name for name in PLAIN if options.wants("lfd", "drift") or name == "superclass"]
        prompts = {name: tuple(protocol.prompts(name, superclass)) for name in needed}
        self.groups = {name: Group(name, prompts[name], superclass, options.seed) for name in needed}
        self.groups[FLOOR] = Group(FLOOR, prompts[CONTEXT], superclass, options.other_seed)

    def run(self) -> dict:
        figures: dict[str, Figure] = {}
        timesteps: dict[str, list] = {}
        for metric, measure in self._measures().items():
            if self.options.wants(metric):
                figures |= measure(timesteps) if metric == "lfd" else measure()
        for name, figure in figures.items():
            figure["settings"] = self._settings(name) | figure.pop("settings", {})
        result = {"label": self.subject.label, **self.subject.about(), "figures": figures}
        result |= {"timesteps": timesteps, "training": self._training(), "pictures": self._pictures()}
        return result

    def _measures(self) -> dict[str, Callable]:
        return {
            "lfd": self._lfd,
            "w2": self._w2,
            "clip_t": self._clip_t,
            "clip_i": lambda: {"clip_i": self._likeness("clip", CONTEXT)},
            "dino": lambda: {"dino": self._likeness("dino", CONTEXT)},
            "pres": lambda: {"pres": self._likeness("dino" if self.tools.dino else "clip", "superclass")},
            "div": self._div,
            "drift": self._drift,
            "exact": self._exact,
        }

    # --- overfitting --------------------------------------------------------------------------------------------------

    def _divergence(self, name: str, checkpoint: int = -1) -> Divergence:
        """LFD of a group at one checkpoint."""
        group = self.groups[name]
        base = self.stages.samples(group)
        regions = self.stages.regions(base, group.superclass) if name == CONTEXT else None
        return self.stages.divergence(group, base, self.subject.checkpoints[checkpoint], regions)

    def _lfd(self, timesteps: dict[str, list]) -> dict[str, Figure]:
        figures = {}
        for name in GROUPS:
            found = self._divergence(name)
            figures[f"lfd_{name}"] = found.estimate().as_dict()
            timesteps[name] = [{"timestep": t} | one.as_dict() for t, one in found.curve()]
        return figures

    def _training(self) -> dict[str, list]:
        """LFD of every checkpoint, for the groups of `options.curve`."""
        checkpoints = self.subject.checkpoints
        if not self.options.wants("lfd") or len(checkpoints) < 2:
            return {}
        return {
            name: [
                {"step": one.concept.steps} | self._divergence(name, i).estimate().as_dict()
                for i, one in enumerate(checkpoints)
            ]
            for name in self.options.curve
        }

    def _w2(self) -> dict[str, Figure]:
        base, ours, other = (self._samples(name) for name in ("base", "ours", FLOOR))
        figures = {}
        for name in ("latent", "clip"):
            for suffix, distance in (("", wasserstein.gaussian), ("_exact", wasserstein.exact)):
                figure, floor = (self._interval(distance, name, base, rows) for rows in (ours, other))
                figures[f"w2_{name}{suffix}"] = figure | {"floor": floor}
        return figures

    def _interval(self, distance: Callable[[Tensor, Tensor], float], name: str, first: Rows, second: Rows) -> Figure:
        """A distance between samples' features, its interval, and the standard error that a normal law has for that."""
        found = self.stages.interval(distance, name, first, second)
        return {"value": found["value"], "stderr": (found["high"] - found["low"]) / NORMAL, "n": len(second), **found}

    def _drift(self) -> dict[str, Figure]:
        share = -(-self.options.samples // len(PLAIN))  # of each group, as many or one more
        drifts = []
        for name in PLAIN:
            base, ours = (self._samples(which, name, share) for which in ("base", "ours"))
            drifts.append(fidelity.drift(*(self.stages.features(rows, "clip") for rows in (base, ours))))
        return {"drift": estimate.mean(torch.cat(drifts)).as_dict()}

    # --- fidelity, alignment, diversity -------------------------------------------------------------------------------

    def _likeness(self, backbone: str, group: str) -> Figure:
        """CLIP-I, DINO and PRES: samples against the photos; beside the base model's, and the photos' own."""
        photos = self.tools.backbone(backbone)(self.subject.photos).cpu()
        figures = [
            estimate.mean(fidelity.pairwise(self.stages.features(self._samples(which, group), backbone), photos))
            for which in ("ours", "base")
        ]
        ours, base = (figure.as_dict() for figure in figures)
        ceiling = estimate.mean(fidelity.among(photos)).as_dict()
        settings = {"backbone": self.tools.backbone(backbone).name, "photos": len(photos)}
        return ours | {"base": base, "ceiling": ceiling, "settings": settings}

    def _clip_t(self) -> dict[str, Figure]:
        group = self.groups[CONTEXT]
        texts = self.tools.clip.texts([plain(prompt, group.superclass) for prompt in group.prompts]).cpu()
        ours, base = (
            estimate.mean(
                fidelity.alignment(features, texts[[i % len(texts) for i in range(len(features))]]),
            ).as_dict()
            for features in (self.stages.features(self._samples(which), "clip") for which in ("ours", "base"))
        )
        return {"clip_t": ours | {"base": base, "settings": {"backbone": self.tools.clip.name}}}

    def _div(self) -> dict[str, Figure]:
        prompts, samples = len(self.groups[CONTEXT].prompts), self.options.samples
        rows = [i for i in range(samples) if i % prompts < samples - prompts]  # of prompts drawn twice at least
        groups, spread = [i % prompts for i in rows], {}
        for which in ("ours", "base"):
            samples = self._samples(which)
            if self.tools.lpips:
                images = self.stages.images(samples, rows)
                distances, settings = fidelity.lpips_diversity(images, groups, self.tools.lpips), {"distance": "LPIPS"}
            else:
                name = "dino" if self.tools.dino else "clip"
                distances = fidelity.diversity(self.stages.features(samples, name)[rows], groups)
                settings = {"distance": f"1 − cos of {self.tools.backbone(name).name}"}
            spread[which] = estimate.mean(distances).as_dict()
        return {"div": spread["ours"] | {"base": spread["base"], "settings": settings}}

    def _exact(self) -> dict[str, Figure]:
        samples = (self._samples(which) for which in ("ours", "base"))
        return self.stages.exact(self.groups[CONTEXT], *samples, self.subject.exact)

    def _pictures(self) -> dict[str, object]:
        count = self.options.samples if self.options.wants(*OF_SAMPLES) else min(self.options.samples, 2 * SHOWN)
        base, ours = (self._samples(which, count=count) for which in ("base", "ours"))
        return gallery(self.stages, self.groups[CONTEXT], base, ours, self.subject.photos)

    def _samples(self, which: str, group: str = CONTEXT, count: int | None = None) -> Rows:
        """Samples `ours` with the concept, `base` without, or those of the `floor`."""
        if which == FLOOR:
            return self.stages.samples(self.groups[FLOOR])
        return self.stages.samples(self.groups[group], self.subject.last if which == "ours" else None, count)

    def _settings(self, metric: str) -> dict[str, object]:
        """What produced a figure, beside models, concept and prompts."""
        options = self.options
        settings = options.sampling() | options.editing()
        if metric.startswith("lfd"):
            settings |= {"strata": options.strata, "weighting": options.weighting}
        if metric.startswith("w2"):
            features = "CLIP image embeddings" if "clip" in metric else "latents pooled to 4 × 4"
            settings |= {"features": features, "estimator": "exact" if metric.endswith("exact") else "gaussian"}
            settings |= {"resamples": options.resamples}
        if metric == "drift":
            settings |= {"backbone": self.tools.clip.name}
        covariance = self.subject.concept.covariance
        return settings | ({} if covariance == IDENTITY else {"covariance": covariance})
