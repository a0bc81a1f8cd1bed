"""What to measure, how, and with which networks."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from infusion.sampling.settings import BETA, TAU
from ldm.util.cli import UserError
from ldm.util.config import find
from ldm.util.defaults import POCKET, POCKET_CLIP

if TYPE_CHECKING:  # a command shows the options' defaults before it imports what measures
    from torch import Tensor

    from clipseg.model import ClipSeg
    from infusion.metrics.run.features import Backbone, TextBackbone

METRICS = ("lfd", "w2", "clip_t", "clip_i", "dino", "pres", "div", "drift", "exact")
OF_PHOTOS = ("clip_i", "dino", "pres")
STEPS = 999  # of sampling, at most: one less than the noise schedule has
CACHE = "cache"  # folder of rows measured before, within that of the results


@dataclass(frozen=True)
class Options:
    """How to measure; the names are those of the flags of `scripts/metrics.py`.

    Attributes:
        metrics: some of `METRICS`.
        samples: of each kind. batch_size: how many at a time.
        steps, scale, sampler: as in `StableDiffusion.sample`. seed: of the first sample; sample i has seed + i.
        strata, weighting: of LFD, see `infusion.metrics.measures.fisher`.
        curve: groups of LFD's curve over training steps.
        beta, tau, strength: of the concepts.
        precision: "full", or "autocast" for the UNet.
        resamples: of the bootstrap.

    Raises:
        ValueError: something unknown or out of range, or too few samples for a metric.
    """

    metrics: tuple[str, ...] = ("lfd", "w2", "clip_t", "div", "drift")
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

    def __post_init__(self) -> None:
        if not self.metrics:
            raise UserError(f"--metrics: name at least one of {', '.join(METRICS)}")
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise UserError(f"--metrics: there is no `{unknown[0]}`; there are {', '.join(METRICS)}")
        for name in ("samples", "batch_size", "steps", "strata", "resamples"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: must be at least 1, not {getattr(self, name)}")
        for name in ("steps", "strata"):
            if getattr(self, name) > STEPS:
                raise UserError(f"--{name}: must be at most {STEPS}, not {getattr(self, name)}")
        for name in ("scale", "beta", "tau", "strength"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"--{name}: must be a finite number, not {getattr(self, name)}")
        if self.tau <= 0:
            raise UserError(f"--tau: must be above 0, not {self.tau}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed: must be from 0 to 2**63 - 1, not {self.seed}")
        if "w2" in self.metrics and self.samples < 2:
            raise UserError(f"--samples: a distance between clouds (w2) needs at least 2 samples, not {self.samples}")

    def wants(self, *names: str) -> bool:
        """Whether any of these metrics is asked for."""
        return any(name in self.metrics for name in names)

    @property
    def other_seed(self) -> int:
        """First seed of another block."""
        return self.seed + max(self.samples, 1000)

    def sampling(self) -> dict[str, object]:
        """What a sample depends on beside prompt, model and concept."""
        names = ("steps", "scale", "sampler", "seed", "precision")
        return {name: getattr(self, name) for name in names}

    def editing(self) -> dict[str, object]:
        """How concepts are blended."""
        return {"beta": self.beta, "tau": self.tau, "strength": self.strength}

    def shown(self) -> dict[str, object]:
        """Every setting, for JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


@dataclass(frozen=True)
class Tools:
    """Networks that measure; None where there is none.

    Attributes:
        clip: of CLIP-I, CLIP-T, W2, DIV and drift. dino: of DINO and PRES.
        lpips: file of AlexNet's weights, for DIV by LPIPS.
        clipseg: finds the concept's region. mask_prompts: what it is asked for, with {} for the superclass.
        inverse_covariance: C⁻¹, (D, D), that the concepts were trained with.
        hashes: of the files of these, by their names here.
    """

    clip: "TextBackbone | None" = None
    dino: "Backbone | None" = None
    lpips: Path | None = None
    clipseg: "ClipSeg | None" = None
    mask_prompts: Sequence[str] = ("a photo of a {}",)
    inverse_covariance: "Tensor | None" = None
    hashes: dict[str, str] = field(default_factory=dict)

    def check(self, options: Options) -> None:
        """Raises ValueError, which names a flag, for a metric that lacks its network."""
        from infusion.metrics.run.features import TextBackbone

        if options.wants("clip_t", "clip_i", "drift", "w2") and self.clip is None:
            raise UserError("--clip: name a folder of CLIP (the files of `openai/clip-vit-large-patch14`, say)")
        if options.wants("clip_t") and not isinstance(self.clip, TextBackbone):
            raise UserError(f"--clip: {self.clip.name} encodes no texts, and clip_t needs them: name a CLIP")
        if options.wants("dino") and self.dino is None:
            raise UserError("--dino: name a folder of DINO (the files of `facebook/dino-vits16`, say)")
        if options.wants("pres") and self.dino is None and self.clip is None:
            raise UserError("--dino: pres needs a folder of DINO, or one of CLIP by --clip")
        if options.wants("div") and self.lpips is None and self.dino is None and self.clip is None:
            raise UserError("--lpips: div needs AlexNet's weights, or a folder by --dino or --clip")
        if options.wants("lfd") and self.clipseg is None:
            raise UserError("--clipseg: lfd needs CLIPSeg, which finds the concept's region")

    def backbone(self, name: str) -> "Backbone":
        """`clip` or `dino`."""
        return {"clip": self.clip, "dino": self.dino}[name]


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
