"""Infusion (Zeng et al., 2024, arXiv 2404.14007): residual value embeddings on the attention maps of a frozen model.

import infusion
from ldm.pipeline import StableDiffusion

sd = StableDiffusion.from_checkpoint("configs/backbone/sd15.yaml", "v1-5-pruned-emaonly.safetensors")
concept = infusion.Concept.load("cat.safetensors")
images = infusion.sample(sd, ["a photo of a {}"], concepts=[concept], steps=50, seed=0)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infusion.concepts.concept import Concept
    from infusion.gate import Gate
    from infusion.sampling.customised import Customised
    from infusion.sampling.regions import Region
    from infusion.sampling.sample import sample
    from infusion.sampling.settings import Settings

_HOMES = {  # imported when they are used: torch takes seconds, and commands check their flags before
    "Concept": "infusion.concepts.concept",
    "Customised": "infusion.sampling.customised",
    "Gate": "infusion.gate",
    "Region": "infusion.sampling.regions",
    "Settings": "infusion.sampling.settings",
    "sample": "infusion.sampling.sample",
}
__all__ = ["Concept", "Customised", "Gate", "Region", "Settings", "sample"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
