"""Where the networks that measure come from: flags, or else the pocket worlds' own files."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data.prompts import TEMPLATES
from infusion.metrics.run.options import METRICS, Options, Tools, identity
from ldm.util.cli import UserError, naming
from ldm.util.config import find
from ldm.util.defaults import CLIPSEG, POCKET

if TYPE_CHECKING:
    import torch

    from clipseg.model import ClipSeg
    from scripts.pocket.exact import Exact

BACKBONES = ("clip", "dino", "dinov2")  # of features, which a folder holds
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
        from data.pocket_two.identity import IdentityFeatures
        from infusion.metrics.run.features import PocketBackbone, load_pocket_clip

        file = self.files[tool]
        if tool == "clip":
            return PocketBackbone(load_pocket_clip(self.configs["clip"], file).to(device), self.name)
        if tool == "clipseg":
            return self.load_clipseg(file).to(device)
        if tool == "identity":
            return IdentityFeatures.load(file, device)
        return self.load_classifier()

    def load_clipseg(self, file: str) -> "ClipSeg":
        """A decoder's file on the world's CLIP."""
        import torch

        from clipseg.weights import fill, read, read_clip
        from ldm.util.config import instantiate, load_config

        with torch.device("meta"):
            model = instantiate(load_config(find(self.configs["clipseg"])).clipseg, "clipseg")
        return fill(model, read_clip(self.files["clip"]) | read(find(file)), file)

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
        {"clip": "configs/pocket_two/clip.yaml", "clipseg": "configs/pocket_two/clipseg.yaml"},
    ),
}


class Sources:
    """Where the networks that measure come from: the flags, or else the pocket world's own."""

    def __init__(self, flags: argparse.Namespace, world: PocketWorld | None) -> None:
        self.world = world
        named = {name: getattr(flags, name) for name in (*BACKBONES, "identity", "lpips", "clipseg")}
        self.named = {name: file for name, file in named.items() if file and not (world and file == POCKET)}
        self.own, self.given = (world.there if world else set()) - set(self.named), set(self.named)
        if not world and "clipseg" not in self.named:
            self.named["clipseg"] = CLIPSEG

    @property
    def there(self) -> set[str]:
        return self.own | set(self.named)

    def load(self, flags: argparse.Namespace, options: Options, device: "torch.device") -> Tools:
        """The networks that the metrics need, and hashes of their files."""
        from infusion.covariance import InverseCovariance

        inverse, needed = InverseCovariance(flags.covariance), self.needed(options)
        loaded, files = {}, {}
        for name in needed:
            if name in self.own:
                loaded[name], files[name] = self.world.load(name, device), identity(self.world.files[name])
                continue
            with naming(f"--{name}"):
                loaded[name], files[name] = self.load_named(name, device), identity(self.file_of(name))
        return Tools(**loaded, mask_prompts=TEMPLATES, inverse_covariance=inverse.matrix, hashes=files)

    def needed(self, options: Options) -> list[str]:
        """Those that some metric may take and those that flags name, sorted."""
        masks = {"clipseg"} if options.wants("lfd", "exact") or options.crop else set()
        reads = {"classifier"} if options.wants("exact", "noun") else set()
        tools = {tool for name in options.metrics for tool in METRICS[name].tools}
        return sorted(self.given | (tools | masks | reads) & self.there)

    def file_of(self, name: str) -> Path | str:
        return WORLDS[POCKET].files[name] if self.named[name] == POCKET else find(self.named[name])

    def load_named(self, name: str, device: "torch.device") -> object:
        from clipseg.weights import load as load_clipseg
        from data.pocket_two.identity import IdentityFeatures
        from infusion.metrics.run.features import load_backbone

        file = self.named[name]
        if name in BACKBONES:
            return load_backbone(file, device)
        if name == "lpips":
            return find(file)
        if name == "identity":
            return IdentityFeatures.load(file, device)
        if find(file).is_file() and self.world is None:
            raise UserError(f"{file} is a file; name a folder with the files of CIDAS/clipseg-rd64-refined")
        own = self.world is not None and find(file).is_file()
        return (self.world.load_clipseg(file) if own else load_clipseg(file)).to(device)
