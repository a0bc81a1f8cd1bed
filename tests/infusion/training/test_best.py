import json
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from clipseg.model import ClipSeg
from infusion.concepts.concept import Concept
from infusion.deltas import detach
from infusion.inject import remove
from infusion.methods import find_method
from infusion.metrics.run.options import Tools
from infusion.training import best as module_under_test
from infusion.training.best import BestConcept
from infusion.training.trainer import ConceptTrainer
from ldm.util.config import ROOT
from ldm.weights.checkpoint import sha256
from tests.infusion import conftest

TEMPLATES = ["a photo of a {}", "the {} in a box"]
PROMPTS = ("a photo of a {}", "a {} on grass")
HOW = {"prompts": PROMPTS, "every": 2, "samples": 3, "steps": 2, "strata": 2}


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
def weighed(monkeypatch):
    """Balances by step in place of measured ones."""

    def put(balances):
        class Told:
            def measure(self, checkpoint):
                step = checkpoint.concept.steps
                return SimpleNamespace(as_dict=lambda: {"step": step, "balance": balances[step]})

        monkeypatch.setattr(BestConcept, "_weigher", lambda *_: Told())

    return put


def test_the_file_is_the_concept_of_the_highest_balance(sd, tools, tmp_path, weighed):
    weighed({2: 0.3, 4: 0.5, 6: 0.5, 7: 0.4})
    best = BestConcept(tools, **HOW)
    module, _ = fit(sd, tmp_path, [best], steps=7)
    kept = Concept.load(tmp_path / "models/best.safetensors")
    assert kept.steps == 4  # the first of two equals
    assert any(not torch.equal(kept.tensors[name], tensor) for name, tensor in module.concept().tensors.items())
    said = json.loads((tmp_path / "models/best.json").read_text())
    assert said["best"] == 4 and [trial["step"] for trial in said["trials"]] == [2, 4, 6, 7]  # the last step, too


def test_nothing_gained_is_no_best(sd, tools, tmp_path, weighed):
    weighed({2: 0.0, 4: 0.0})
    fit(sd, tmp_path, [BestConcept(tools, **HOW)], steps=4)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["best.json"]
    assert json.loads((tmp_path / "models/best.json").read_text())["best"] is None


@pytest.mark.parametrize("patience, last", [(0, 12), (1, 6), (2, 10)])
def test_early_stop(sd, tools, tmp_path, weighed, patience, last):
    weighed({2: 0.1, 4: 0.4, 6: 0.3, 8: 0.4, 10: 0.2, 12: 0.9})
    _, trainer = fit(sd, tmp_path / str(patience), [BestConcept(tools, **HOW, early_stop=patience)], steps=12)
    assert trainer.global_step == last + (patience == 2) * (8 - 10)  # 6 and 8 brought nothing better than 4


@pytest.mark.parametrize("method", ["infusion", "dreambooth"])
def test_weighing_changes_nothing_of_the_training(sd, tools, tmp_path, method):
    best = BestConcept(tools, **HOW)
    watched, _ = fit(sd, tmp_path / "watched", [best], method=method)
    state = {name: tensor.clone() for name, tensor in watched.state_dict().items()}
    remove(sd.unet)
    detach(sd.unet)
    alone, _ = fit(sd, tmp_path / "alone", [], method=method)
    assert all(torch.equal(state[name], tensor) for name, tensor in alone.state_dict().items())
    assert [trial["step"] for trial in best.trials] == [2, 4, 6]
    assert len({trial["base_likeness"] for trial in best.trials}) == 1  # of the base model, whatever was learned
    assert best.trials[0]["lfd"] > 0 and best.trials[0]["lfd"] != best.trials[1]["lfd"]


def test_a_trial_is_of_the_base_model_that_nothing_was_learned_on(sd, tools, tmp_path):
    """Base samples drawn while weights have already moved are those drawn before."""
    trials = []
    for every in (2, 6):
        best = BestConcept(tools, **HOW | {"every": every})
        fit(sd, tmp_path / str(every), [best], method="dreambooth")
        detach(sd.unet)
        trials.append(best.trials[-1])
    assert trials[0] == trials[1] and trials[0]["lfd"] > 0


def test_a_resumed_run_knows_the_trials_before(sd, tools, tmp_path):
    whole = BestConcept(tools, **HOW)
    fit(sd, tmp_path / "whole", [whole])
    remove(sd.unet)
    _, trainer = fit(sd, tmp_path / "half", [BestConcept(tools, **HOW)], steps=4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    remove(sd.unet)
    resumed = BestConcept(tools, **HOW)
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
def test_numbers_out_of_range(tools, wrong, said):
    with pytest.raises(ValueError, match=said):
        BestConcept(tools, **HOW | wrong)


def test_networks_are_wanted():
    with pytest.raises(ValueError, match="--clip"):
        BestConcept(Tools(), **HOW)


def test_networks_by_name():
    found = module_under_test.Networks("pocket", "pocket", "cpu")
    assert found.clip.name == "pocket" and isinstance(found.clipseg, ClipSeg)
    assert found.hashes == {name: sha256(ROOT / f"ckpt/pocket/{name}.safetensors") for name in ("clip", "clipseg")}
    with pytest.raises(ValueError, match="nowhere"):
        module_under_test.Networks("nowhere", "pocket", "cpu")


def test_only_one_concept_is_weighed(tools):
    with pytest.raises(ValueError, match="leave it out"):
        BestConcept(tools, **HOW).on_fit_start(SimpleNamespace(), pl.LightningModule())
