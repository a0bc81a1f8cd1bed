"""What the pages show is run."""

import re
import sys
from pathlib import Path

import pytest
import torch

import infusion.methods
import infusion.regularisers
from infusion.concepts.concept import Concept
from infusion.inject import cross_attention_layers
from infusion.sampling.sample import sample
from infusion.training.trainer import ConceptTrainer
from ldm.pipeline import StableDiffusion
from ldm.util.config import ROOT


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
    exec(re.sub(r"steps=\d+", "steps=2", "\n".join(blocks)), shown)
    assert shown["images"].shape == (4, 3, 64, 64) and not torch.equal(shown["images"], shown["same_seeds"])
    assert (tmp_path / "dogs.png").stat().st_size > 1000
    assert shown["prediction"].shape == (1, 4, 16, 16) and shown["attention"].shape == (1, 1, 16, 16)
    assert not torch.equal(shown["faint"], shown["hard"]) and shown["both"].isfinite().all()


def test_the_sixth_method_is_one_file_and_one_config(tmp_path, monkeypatch, tiny, photos, command):
    page = (ROOT / "docs/adding-a-method.md").read_text()
    (method,), (config,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "yaml"))
    (tmp_path / "package").mkdir()
    (tmp_path / "package/bitfit.py").write_text(method)
    monkeypatch.setattr(infusion.methods, "__path__", [*infusion.methods.__path__, str(tmp_path / "package")])
    (tmp_path / "bitfit.yaml").write_text(config.replace("concept.yaml", f"{ROOT}/configs/method/concept.yaml"))
    bases = (tiny, tmp_path / "bitfit.yaml")
    options = ("data_root=" + str(photos), "superclass=cat", "callbacks.samples=null", "trainer.max_steps=2")
    try:
        command("--base", *bases, "-t", "--logdir", tmp_path / "run", *options, "learning_rate=0.1")
        concept = Concept.load(tmp_path / "run/models/step=000002.safetensors")
        sd = StableDiffusion.from_checkpoint(tiny)
        images = sample(sd, ["a {}"], [concept], steps=2, seed=0)
    finally:
        sys.modules.pop("infusion.methods.bitfit", None)
    assert (
        concept.method == "bitfit"
        and concept.noun == "sks cat"
        and concept.numbers == sum(layer.to_out[0].bias.numel() for layer in cross_attention_layers(sd.unet).values())
    )
    assert not torch.equal(images, sd.sample(["a sks cat"], steps=2, seed=0))


def test_another_regulariser_is_one_file_and_one_config(tmp_path, monkeypatch, tiny, photos, command):
    page = (ROOT / "docs/regularisers.md").read_text()
    (term,), (config,) = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "yaml"))
    (tmp_path / "package").mkdir()
    (tmp_path / "package/centred.py").write_text(term)
    package = infusion.regularisers
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / "package")])
    (tmp_path / "centred.yaml").write_text(config)
    bases = (tiny, ROOT / "configs/method/lora.yaml", ROOT / "configs/with/l2_to_start.yaml", tmp_path / "centred.yaml")
    options = ("data_root=" + str(photos), "superclass=cat", "callbacks.samples=null", "trainer.max_steps=2")
    logged = []
    monkeypatch.setattr(ConceptTrainer, "log", lambda self, name, *_, **__: logged.append(name))
    try:
        command("--base", *bases, "-t", "--logdir", tmp_path / "run", *options, "trainer.precision=32-true")
    finally:
        sys.modules.pop("infusion.regularisers.centred", None)
    assert Concept.load(tmp_path / "run/models/step=000002.safetensors").method == "lora"
    assert {"train/centred", "train/l2_to_start", "train/loss"} <= set(logged)
