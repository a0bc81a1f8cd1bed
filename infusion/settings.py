"""How to sample: what a command lets one choose, and what is usual."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infusion.regions import Region

BETA, TAU = 0.7, 0.15  # the gate when sampling; training uses 0.75 and 0.1


@dataclass(frozen=True)
class Settings:
    """How to sample; the names are those of the flags of `scripts/infusion_txt2img.py`.

    Attributes:
        steps: sampling steps. scale: classifier-free guidance, 1 is none. sampler: a key of `ldm.schedulers.SAMPLERS`.
        ddim_eta: share of DDIM's noise, in [0, 1].
        negative_prompt: what to guide away from.
        H, W: pixels; None is the size of training.
        beta, tau, strength: one value, or one for each concept.
        gate: kind of gate, one or one for each concept; None is what each was trained with.
        replace_word: what stands in the prompts for each concept; None is what each was trained with.
        region: boxes that concepts keep to.
        precision: "full" is the model's own; "autocast" runs the UNet in half precision (`StableDiffusion.autocast`).
    """

    steps: int = 50
    scale: float = 7.5
    sampler: str = "ddim"
    ddim_eta: float = 0.0
    negative_prompt: str = ""
    H: int | None = None
    W: int | None = None
    beta: float | Sequence[float] = BETA
    tau: float | Sequence[float] = TAU
    strength: float | Sequence[float] = 1.0
    gate: str | Sequence[str] | None = None
    replace_word: Sequence[str] | None = None
    region: "Sequence[Region]" = ()
    precision: str = "full"
