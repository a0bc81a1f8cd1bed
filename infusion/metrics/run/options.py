"""What to measure, how, and with which networks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infusion.sampling.settings import BETA, TAU
from ldm.util.cli import UserError
from ldm.util.config import find
from ldm.util.defaults import POCKET, POCKET_CLIP

if TYPE_CHECKING:  # a command shows the options' defaults before it imports what measures
    from torch import Tensor

    from clipseg.model import ClipSeg
    from infusion.metrics.run.features import Backbone, NounReader, TextBackbone
    from infusion.metrics.run.subject import Subject

EVALUATION_SEED = 10**8  # added to every measured seed: no picture of a training is drawn from those of a measurement
STEPS = 999  # of sampling, at most: one less than the noise schedule has
CACHE = "cache"  # folder of rows measured before, within that of the results
CONCEPT, WORDS, PICTURES = KINDS = ("concept", "words", "pictures")  # of rows
CLIP = "--clip: name a folder of CLIP (the files of `openai/clip-vit-large-patch14`, say)"
HINTS = {  # tool -> where it comes from
    "clip": CLIP,
    "classifier": CLIP,
    "dino": "--dino: name a folder of DINO (the files of `facebook/dino-vits16`, say)",
    "dinov2": "--dinov2: name a folder of DINOv2 (the files of `facebook/dinov2-small`, say)",
    "identity": "--identity: name the weights of the pocket world's identity network",
    "lpips": "--lpips: name AlexNet's weights, or a folder by --dino or --clip",
    "clipseg": "--clipseg: name a folder of CLIPSeg, which finds the concept's region",
}


@dataclass(frozen=True)
class Metric:
    """What a metric takes.

    Attributes:
        tools: of `Tools`, of which it takes the first that there is; () takes none.
        photos: whether the concept's photos are needed.
        kinds: of the rows that can have it.
    """

    tools: tuple[str, ...] = ()
    photos: bool = False
    kinds: tuple[str, ...] = KINDS


METRICS = {
    "lfd": Metric(("clipseg",), kinds=(CONCEPT,)),
    "w2": Metric(("clip",)),
    "kid": Metric(("clip",)),
    "clip_t": Metric(("clip",)),
    "identity": Metric(("identity",), photos=True),
    "dino": Metric(("dino",), photos=True),
    "dinov2": Metric(("dinov2",), photos=True),
    "clip_i": Metric(("clip",), photos=True),
    "noun": Metric(("classifier", "clip")),
    "pres": Metric(("dino", "clip"), photos=True, kinds=(CONCEPT,)),
    "div": Metric(("lpips", "dino", "clip")),
    "drift": Metric(("clip",), kinds=(CONCEPT,)),
    "exact": Metric(),
}
LIKENESS = {"identity": "identity", "dino": "dino", "dinov2": "dinov2", "clip_i": "clip"}  # metric -> its network
CLOUDS = {"w2": 2, "kid": 3}  # metric -> samples that it needs at least


@dataclass(frozen=True)
class Options:
    """How to measure; the names are those of the flags of `scripts/metrics.py`, which checks them.

    Attributes:
        metrics: some of `METRICS`; a row has those that its kind allows.
        samples: of each kind. batch_size: how many at a time.
        steps, scale, sampler: as in `StableDiffusion.sample`. seed: see `first_seed`.
        strata, weighting: of LFD, see `infusion.metrics.measures.fisher`.
        curve: groups of LFD's curve over training steps.
        beta, tau, strength: of the concepts.
        precision: "full", or "autocast" for the UNet.
        resamples: of the bootstrap.
        crop: compare photos and samples by their subject alone, see `infusion.metrics.run.features.crop_to`.
    """

    metrics: tuple[str, ...] = ("lfd", "w2", "kid", "clip_t", "noun", "div", "drift")
    samples: int = 64
    batch_size: int = 8
    steps: int = 25
    scale: float = 7.5
    sampler: str = "ddim"
    seed: int = 0
    strata: int = 10
    weighting: Literal["eps", "score"] = "eps"
    curve: tuple[str, ...] = ("context", "superclass")
    beta: float = BETA
    tau: float = TAU
    strength: float = 1.0
    precision: Literal["full", "autocast"] = "full"
    resamples: int = 1000
    crop: bool = False

    def wants(self, *names: str) -> bool:
        """Whether any of these metrics is asked for."""
        return any(name in self.metrics for name in names)

    @property
    def first_seed(self) -> int:
        """Seed of the first measured sample: `seed` + `EVALUATION_SEED`; sample i has i more."""
        return self.seed + EVALUATION_SEED

    @property
    def other_seed(self) -> int:
        """First seed of another block of measured samples."""
        return self.first_seed + max(self.samples, 1000)

    def sampling(self) -> dict[str, object]:
        """What a sample depends on beside prompt, model, concept and seed."""
        return {name: getattr(self, name) for name in ("steps", "scale", "sampler", "precision")}

    def editing(self) -> dict[str, object]:
        """How concepts are blended."""
        return {"beta": self.beta, "tau": self.tau, "strength": self.strength}

    def shown(self) -> dict[str, object]:
        """Every setting, for JSON."""
        said = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return said | {"first_seed": self.first_seed}


@dataclass(frozen=True)
class Tools:
    """Networks that measure; None where there is none.

    Attributes:
        clip: of CLIP-I, CLIP-T, W2, KID, DIV and drift. dino: of DINO and PRES. dinov2, identity: of these likenesses.
        classifier: sees which noun a sample shows; without one, or where it does not know the noun, CLIP is asked.
        lpips: file of AlexNet's weights, for DIV by LPIPS.
        clipseg: finds the concept's region. mask_prompts: what it is asked for, with {} for the superclass.
        inverse_covariance: C⁻¹, (D, D), that the concepts were trained with.
        hashes: of the files of these, by their names here.
    """

    clip: "TextBackbone | None" = None
    dino: "Backbone | None" = None
    dinov2: "Backbone | None" = None
    identity: "Backbone | None" = None
    classifier: "NounReader | None" = None
    lpips: Path | None = None
    clipseg: "ClipSeg | None" = None
    mask_prompts: Sequence[str] = ("a photo of a {}",)
    inverse_covariance: "Tensor | None" = None
    hashes: Mapping[str, str] = field(default_factory=dict)

    def backbone(self, name: str) -> "Backbone":
        """Of features: `clip`, `dino`, `dinov2` or `identity`."""
        return getattr(self, name)

    @property
    def there(self) -> set[str]:
        """The names of those that there are."""
        return {each.name for each in fields(self) if getattr(self, each.name) is not None}

    def first_of(self, *names: str) -> str:
        """The first of these that there is."""
        return next(name for name in names if name in self.there)


def lacks(metric: str, subject: "Subject", there: Collection[str]) -> str:
    """What to do so that a row can have a metric; "" where it can, or is of a kind that has none.

    Args:
        there: names of the tools that there are, see `Tools.there`.
    """
    about = METRICS[metric]
    if about.tools and not set(about.tools) & set(there):
        return f"{HINTS[about.tools[0]]}; {metric} needs it"
    if subject.kind not in about.kinds:
        return ""
    if about.photos and not subject.has_photos:
        return f"--images: {metric} compares with the concept's photos; name their folder"
    if metric == "exact" and subject.exact is None:
        return f"--concept: exact figures are of the pocket world's own concepts; which is {subject.label}?"
    return ""


def metrics_of(subject: "Subject", metrics: Sequence[str]) -> list[str]:
    """Those of some metrics that a row of its kind can have."""
    return [name for name in metrics if subject.kind in METRICS[name].kinds]


def identity(spec: str | Path) -> str:
    """SHA-256 of what a flag names: a file, the pocket CLIP, or the files of a folder; ValueError for none of these."""
    from ldm.weights.checkpoint import sha256

    path = find(POCKET_CLIP if str(spec) == POCKET else spec)
    if not path.exists():
        raise UserError(f"{spec}: no such file")
    if path.is_dir():
        tensors = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        return "+".join(sha256(file) for file in (*sorted(path.glob("*.json")), *tensors))
    return sha256(path)
