import json
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from data.pocket_two.identity import Identity
from infusion.concepts.concept import Concept
from infusion.deltas import detach
from infusion.inject import remove
from infusion.methods import find_method
from infusion.training import best as module_under_test
from infusion.training import callbacks
from infusion.training.best import BestConcept
from infusion.training.trainer import ConceptTrainer
from ldm.util.config import instantiate
from tests.infusion import conftest
from tests.infusion.metrics.conftest import FakeClip

TEMPLATES = ["a photo of a {}", "the {} in a box"]
PROMPTS = ("a photo of a {}", "a {} on grass")
HOW = {"prompts": PROMPTS, "every": 2, "samples": 3, "steps": 2}


class Photos(pl.LightningDataModule):
    """The same batch of noise again and again, and three photos of a concept."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        self.items = [{"latents": one, "template": TEMPLATES[0]} for one in latents] * 8
        self.images = SimpleNamespace(images=torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1)

    def train_dataloader(self):
        return DataLoader(self.items, batch_size=2)


def fit(sd, folder, callbacks, steps=6, method="infusion", ckpt_path=None):
    """The trained module and its trainer; the module's UNet stays edited."""
    torch.manual_seed(0)
    module = ConceptTrainer(sd, find_method(method)(), "cat", TEMPLATES, learning_rate=0.05)
    return module, conftest.fit(module, folder, Photos(), steps, ckpt_path, callbacks)


@pytest.fixture
def told(monkeypatch):
    """Likenesses by step in place of measured ones; the base model's is 0.1."""

    def put(likenesses):
        found = iter(value for likeness in likenesses for value in (likeness, 0.1))
        drawn = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(callbacks, "sample", lambda *_, **__: drawn)
        monkeypatch.setattr(module_under_test.fidelity, "pairwise", lambda *_: torch.tensor([next(found)]))

    return put


def test_the_file_and_the_picture_are_the_best_step_s(sd, tmp_path, told):
    told([0.3, 0.5, 0.52, 0.4])
    module, _ = fit(sd, tmp_path, [BestConcept(FakeClip(), **HOW)], steps=7)
    kept = Concept.load(tmp_path / "models/best.safetensors")
    assert kept.steps == 4  # what step 6 brings is not worth it
    assert any(not torch.equal(kept.tensors[name], tensor) for name, tensor in module.concept().tensors.items())
    said = json.loads((tmp_path / "models/best.json").read_text())
    assert said["best"] == 4 and [trial["step"] for trial in said["trials"]] == [2, 4, 6, 7]  # the last step, too
    picture = Image.open(tmp_path / "images/best.png")
    assert picture.size == (3 * 18 + 2, 2 * 18 + 2)  # the base model's above


def test_nothing_gained_is_no_best(sd, tmp_path, told):
    told([0.1, 0.05])
    fit(sd, tmp_path, [BestConcept(FakeClip(), **HOW)], steps=4)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["best.json"]
    assert json.loads((tmp_path / "models/best.json").read_text())["best"] is None


@pytest.mark.parametrize(("patience", "last"), [(0, 12), (1, 6), (2, 8)])
def test_early_stop(sd, tmp_path, told, patience, last):
    told([0.2, 0.5, 0.4, 0.5, 0.3, 1.0])
    best = BestConcept(FakeClip(), **HOW, early_stop=patience)
    assert fit(sd, tmp_path, [best], steps=12)[1].global_step == last


@pytest.mark.parametrize("method", ["infusion", "dreambooth"])
def test_a_trial_changes_nothing_of_the_training(sd, tmp_path, method):
    best = BestConcept(FakeClip(), **HOW)
    watched, _ = fit(sd, tmp_path / "watched", [best], method=method)
    state = {name: tensor.clone() for name, tensor in watched.state_dict().items()}
    remove(sd.unet)
    detach(sd.unet)
    alone, _ = fit(sd, tmp_path / "alone", [], method=method)
    assert all(torch.equal(state[name], tensor) for name, tensor in alone.state_dict().items())
    assert [trial["step"] for trial in best.trials] == [2, 4, 6]
    assert len({trial["base_likeness"] for trial in best.trials}) == 1  # of the base model, whatever was learned
    assert len({trial["likeness"] for trial in best.trials}) == 3


def test_a_trial_is_of_the_base_model_that_nothing_was_learned_on(sd, tmp_path):
    """Base samples drawn while weights have already moved are those drawn before."""
    trials = []
    for every in (2, 6):
        best = BestConcept(FakeClip(), **HOW | {"every": every})
        fit(sd, tmp_path / str(every), [best], method="dreambooth")
        detach(sd.unet)
        trials.append(best.trials[-1])
    assert trials[0] == trials[1] and trials[0]["likeness"] != trials[0]["base_likeness"]


def test_a_resumed_run_knows_the_trials_before(sd, tmp_path):
    whole = BestConcept(FakeClip(), **HOW)
    fit(sd, tmp_path / "whole", [whole])
    remove(sd.unet)
    _, trainer = fit(sd, tmp_path / "half", [BestConcept(FakeClip(), **HOW)], steps=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    remove(sd.unet)
    resumed = BestConcept(FakeClip(), **HOW)
    fit(sd, tmp_path / "half", [resumed], ckpt_path=tmp_path / "half.ckpt")
    assert [trial["step"] for trial in resumed.trials] == [2, 4, 6]
    assert resumed.trials == whole.trials


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"every": 0}, "every"),
        ({"early_stop": -1}, "early_stop"),
        ({"samples": 0}, "samples"),
        ({"prompts": ("a cat",)}, "a cat"),
    ],
)
def test_numbers_out_of_range(wrong, said):
    with pytest.raises(ValueError, match=said):
        BestConcept(FakeClip(), **HOW | wrong)


def test_networks_by_name():
    assert BestConcept("pocket", **HOW).network.name == "pocket"
    with pytest.raises(ValueError, match="nowhere"):
        BestConcept("nowhere", **HOW)


def test_a_config_may_name_any_network(tmp_path):
    save_file(Identity().state_dict(), tmp_path / "identity.safetensors")
    weights = {"weights": str(tmp_path / "identity.safetensors")}
    network = {"target": "data.pocket_two.identity.IdentityFeatures.load", "params": weights}
    node = {"target": "infusion.training.best.BestConcept", "params": {"network": network}}
    best = instantiate(node, "callbacks.best")
    assert best.network.name == "identity"
    assert best.network(torch.rand(2, 3, 64, 64)).norm(dim=1).tolist() == pytest.approx([1, 1])
    network["params"] = {"wieghts": "a"}
    with pytest.raises(ValueError, match="^callbacks.best.params.network.params.wieghts: .* did you mean `weights`"):
        instantiate(node, "callbacks.best")


def test_only_one_concept_is_judged():
    with pytest.raises(ValueError, match="leave it out"):
        BestConcept(FakeClip(), **HOW).on_fit_start(SimpleNamespace(), pl.LightningModule())
