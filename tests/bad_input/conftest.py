"""A working folder, and a concept of the pocket model."""

from pathlib import Path

import pytest
import torch

from infusion.concepts.concept import Concept
from infusion.inject import cross_attention_layers
from ldm.pipeline import StableDiffusion
from tests.bad_input.bench import POCKET, Bench


@pytest.fixture(scope="session")
def pocket_concept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A concept file of the pocket model: a dog, small random residuals."""
    sd = StableDiffusion.from_checkpoint(POCKET)
    generator = torch.Generator().manual_seed(0)
    layers = cross_attention_layers(sd.unet)
    tensors = {n: 0.1 * torch.randn(layer.heads * layer.dim_head, generator=generator) for n, layer in layers.items()}
    path = tmp_path_factory.mktemp("concept") / "dog.safetensors"
    Concept(tensors, "dog", ("a photo of a {}",), "pocket", base_hash=sd.hash).save(path)
    return path


@pytest.fixture
def bench(tmp_path: Path, pocket_concept: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """An empty working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Bench(folder, pocket_concept)
