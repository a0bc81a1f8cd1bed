"""Networks that measure, in place of trained ones, and concepts to measure."""

import hashlib
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from infusion.deltas import detach
from infusion.inject import remove
from infusion.methods import find_method
from infusion.metrics.run.cache import Cache
from infusion.metrics.run.options import Options, Tools
from infusion.metrics.run.protocol import Protocol
from infusion.metrics.run.subject import Checkpoint, Subject
from infusion.training.trainer import ConceptTrainer

ROUNDING = 1e-11  # of LFD, between a row in one batch and the same row in another
TEMPLATES = ["a photo of a {}", "the {} in a box"]


class FakeClip:
    """Features of images are their pixels, shrunk; those of a text are drawn for it."""

    name, width = "fake", 48

    def __call__(self, images):
        return F.normalize(F.adaptive_avg_pool2d(images, 4).flatten(1) - 0.5, dim=1)

    def texts(self, texts):
        seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
        rows = [torch.randn(self.width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return F.normalize(torch.stack(rows), dim=1)


class LeftHalf(nn.Module):
    """In place of CLIPSeg: everything stands in the left half of a picture."""

    def masks(self, images, prompts):
        masks = torch.zeros(len(images), 16, 16)
        masks[:, :, :8] = 0.5
        return masks


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Many small files are written, and no test here is about a power cut."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "rows")


@pytest.fixture
def tools():
    return Tools(clip=FakeClip(), clipseg=LeftHalf())


@pytest.fixture
def protocol():
    return Protocol(
        concept=("a photo of a {}", "a {} on grass"),
        none=("grass", "the sea"),
        superclass=("a {superclass}", "a {superclass} in a box"),
        neighbours=("a {neighbour}",),
        kin=(("cat", "dog", "owl"),),
    )


@pytest.fixture
def options():
    return Options(samples=4, batch_size=3, steps=2, scale=2.0, strata=2, resamples=20)


def learn(sd, name, steps=2, learning_rate=0.05, **arguments):
    """A concept of a method after some steps on noise."""
    torch.manual_seed(3)
    module = ConceptTrainer(sd, find_method(name)(**arguments), "cat", TEMPLATES, learning_rate=learning_rate)
    batch = {"latents": torch.randn(2, 4, 8, 8), "template": TEMPLATES}
    optimizer = module.configure_optimizers()
    for step in range(steps):
        optimizer.zero_grad()
        module.denoising_loss(batch, torch.Generator().manual_seed(step), {}).backward()
        optimizer.step()
    module.on_fit_start()
    concept = module.concept()
    detach(sd.unet)
    remove(sd.unet)
    return concept


@pytest.fixture
def subject(sd):
    """Method and arguments -> what there is to measure."""

    def make(name, label="", **arguments):
        return Subject(label or name, (Checkpoint.of(learn(sd, name, **arguments)),))

    return make
