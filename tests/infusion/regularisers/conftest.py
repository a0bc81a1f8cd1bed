"""A contextualizer with random weights."""

from pathlib import Path

import pytest
import torch

from infusion.regularisers.contextualizer import Contextualizer, save
from ldm.pipeline import StableDiffusion

PROMPTS = """
words: {place: [on grass, on the beach, in a box]}
scenes:
  templates: ["a photo of a {} {place}", "the {}"]
styles:
  templates: ["{style} of a {} beside a cat"]
  style: [an oil painting, a sketch]
"""


@pytest.fixture
def contextualizer(sd: StableDiffusion, tmp_path: Path) -> Path:
    torch.manual_seed(2)
    save(tmp_path / "c.safetensors", Contextualizer.of(sd.text, layers=2, heads=2), {"base_architecture": "tiny"})
    return tmp_path / "c.safetensors"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.yaml").write_text(PROMPTS)
    return tmp_path / "prompts.yaml"
