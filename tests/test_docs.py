"""What the pages show is run."""

import re
from pathlib import Path

import pytest
import torch

from infusion.concept import Concept
from infusion.inject import cross_attention_layers
from ldm.config import ROOT
from ldm.pipeline import StableDiffusion


def test_the_python_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sd = StableDiffusion.from_checkpoint(ROOT / "configs/backbone/pocket.yaml")
    for name, noun in (("blue_striped_dog", "dog"), ("zigzag_hat", "hat")):
        layers = cross_attention_layers(sd.unet)
        tensors = {layer: 0.3 * torch.randn(module.heads * module.dim_head) for layer, module in layers.items()}
        concept = Concept(tensors, noun, ("a photo of a {}",), sd.architecture, base_hash=sd.hash)
        concept.save(tmp_path / f"concepts/{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    shown: dict = {}
    exec("\n".join(blocks), shown)
    assert shown["images"].shape == (4, 3, 64, 64) and not torch.equal(shown["images"], shown["same_seeds"])
    assert (tmp_path / "dogs.png").stat().st_size > 1000
    assert shown["prediction"].shape == (1, 4, 16, 16) and shown["attention"].shape == (1, 1, 16, 16)
    assert not torch.equal(shown["faint"], shown["hard"]) and shown["both"].isfinite().all()
