"""The pocket worlds' own networks, which measure where no flag names others."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ldm.util.config import find
from ldm.util.defaults import POCKET

if TYPE_CHECKING:
    import torch

    from scripts.pocket.exact import Exact

POCKET_TWO = "pocket_two"


@dataclass(frozen=True)
class PocketWorld:
    """A pocket world, known by the architecture of its base model.

    Attributes:
        files: name of a tool -> its weights.
        configs: of its CLIP and its CLIPSeg.
    """

    name: str
    files: dict[str, str] = field(default_factory=dict)
    configs: dict[str, str] = field(default_factory=dict)

    @property
    def there(self) -> set[str]:
        """The tools of which the weights are there."""
        return {tool for tool, file in self.files.items() if find(file).is_file()}

    @property
    def exact(self) -> "type[Exact]":
        """Exact measures of the world's concepts."""
        from scripts.pocket import exact
        from scripts.pocket_two import exact as exact_two

        return exact_two.Exact if self.name == POCKET_TWO else exact.Exact

    def load(self, tool: str, device: "torch.device") -> object:
        """A tool of `infusion.metrics.run.options.Tools`."""
        from clipseg.weights import load as load_clipseg
        from data.pocket_two.identity import IdentityFeatures
        from infusion.metrics.run.features import PocketBackbone, load_pocket_clip

        file = self.files[tool]
        if tool == "clip":
            return PocketBackbone(load_pocket_clip(self.configs["clip"], file).to(device), self.name)
        if tool == "clipseg":
            return load_clipseg(file, config=self.configs["clipseg"]).to(device)
        if tool == "identity":
            return IdentityFeatures.load(file, device)
        return self.load_classifier()

    def load_classifier(self) -> object:
        """What reads the world's scenes, on the CPU."""
        from data.pocket_two.judge import SceneReader
        from ldm.weights.checkpoint import load_into
        from scripts.pocket.judge import load_classifier

        if self.name != POCKET_TWO:
            return load_classifier(self.files["classifier"])
        reader = SceneReader()
        load_into({"": reader}, find(self.files["classifier"]))
        return reader.requires_grad_(False).eval()


def _files(folder: str, *tools: str) -> dict[str, str]:
    return {tool: f"ckpt/{folder}/{tool}.safetensors" for tool in tools}


WORLDS = {
    POCKET: PocketWorld(
        POCKET,
        _files(POCKET, "clip", "clipseg", "classifier"),
        {"clip": "configs/pocket_clip.yaml", "clipseg": "configs/pocket_clipseg.yaml"},
    ),
    POCKET_TWO: PocketWorld(
        POCKET_TWO,
        _files(POCKET_TWO, "clip", "clipseg", "classifier", "identity"),
        {"clip": "configs/pocket_two/clip.yaml", "clipseg": "configs/pocket_two/masks.yaml"},
    ),
}
