import logging
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from ldm.util import run
from ldm.util.run import STATE, Finite, NonFinite, ResumeState, StateFile, working_in
from tests.infusion.conftest import fit

BAD = 3  # the batch, from 0, with a number that is not finite


class Module(pl.LightningModule):
    """Learns two numbers by least squares; `spoil` turns one batch's loss into another."""

    def __init__(self, spoil=lambda loss: loss) -> None:
        super().__init__()
        self.spoil = spoil
        self.weight = nn.Parameter(torch.zeros(2))
        self.seen = []  # the weight before each batch

    def training_step(self, batch, batch_idx):
        self.seen.append(self.weight.detach().clone())
        loss = ((self.weight - batch) ** 2).mean()
        return self.spoil(loss) if batch_idx == BAD else loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Killed(BaseException):
    pass


class Kill(pl.Callback):
    """Ends a training without a word, after a number of batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batches:
            raise Killed


def batches(number):
    return DataLoader(torch.full((number,), 2.0), batch_size=None)  # the same throughout: a loader begins anew


def train(folder, kill=None, every=1, **options):
    module = Module()
    callbacks = [EMAWeightAveraging(decay=0.9), ResumeState(every, **options), *([Kill(kill)] if kill else [])]
    state = folder / STATE if (folder / STATE).exists() else None
    fit(module, folder, batches(12), 6, state, callbacks, accumulate_grad_batches=2, plugins=[StateFile()])
    return module


@pytest.mark.parametrize("number", [3, 4, 7])
def test_a_killed_training_learns_what_it_would_have(tmp_path, number):
    """Optimiser, schedule, averaged weights, and the position among the micro-batches."""
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "halted", kill=number)
    rest = train(tmp_path / "halted")
    assert torch.equal(whole.weight, rest.weight) and len(rest.seen) == 12 - number // 2 * 2


def test_states_are_written_between_steps_and_when_all_else_is_done(tmp_path, monkeypatch):
    steps, save = [], StateFile.save_checkpoint

    def noted(self, checkpoint, path, **options):
        steps.append(checkpoint["global_step"])
        save(self, checkpoint, path)

    monkeypatch.setattr(StateFile, "save_checkpoint", noted)
    train(tmp_path, every=2)
    assert steps == [2, 4, 6]  # and not after the first micro-batch of a step, nor twice at the end


def test_so_many_states_are_kept_and_fewer_where_fewer_are_wanted(tmp_path):
    train(tmp_path, keep=3)
    folder = tmp_path / "models"
    assert sorted(path.name for path in folder.glob("step=*.ckpt")) == [f"step={step:06d}.ckpt" for step in (4, 5, 6)]
    assert (tmp_path / STATE).read_bytes() == (folder / "step=000006.ckpt").read_bytes()
    (tmp_path / STATE).unlink()
    train(tmp_path, keep=1)
    assert not list(folder.glob("step=*.ckpt")) and torch.load(tmp_path / STATE, weights_only=True)["global_step"] == 6


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    now = run.datetime.now()
    monkeypatch.setattr(run, "datetime", SimpleNamespace(now=lambda: now))
    first = run.new_folder(None, str(tmp_path), "cat")
    first.mkdir()
    assert run.new_folder(None, str(tmp_path), "cat").name == f"{first.name}-2" and first.name.endswith("_cat")


@pytest.mark.parametrize("options", [{"every": 0}, {"keep": 0}])
def test_numbers_below_one_are_refused(options):
    with pytest.raises(ValueError, match="must be at least 1"):
        ResumeState(**options)


def test_a_run_removes_what_a_killed_process_left(tmp_path):
    (tmp_path / "models/.1.partial").mkdir(parents=True)
    (tmp_path / "models/.1.partial/last.ckpt").touch()
    with working_in(tmp_path, "a: 1"):
        assert not list(tmp_path.rglob("*.partial")) and (tmp_path / "config.yaml").read_text() == "a: 1"


def no_gradient(loss):
    """The same loss with a gradient that is not finite."""
    return loss + torch.sqrt(loss * 0)


SPOILT = {
    "nan": (lambda loss: loss * torch.nan, "the loss is nan"),
    "inf": (lambda loss: loss * torch.inf, "the loss is inf"),
    "gradient": (no_gradient, "a gradient is not finite"),
}


@pytest.mark.parametrize(("spoil", "what"), SPOILT.values(), ids=SPOILT)
def test_a_fault_stops_before_it_reaches_what_is_learned(tmp_path, spoil, what):
    module = Module(spoil)
    with pytest.raises(NonFinite, match=rf"^step {BAD + 1}: {what}; lower .*non_finite=skip"):
        fit(module, tmp_path, batches(6), 6, callbacks=[Finite()])
    assert torch.equal(module.weight, module.seen[BAD]) and module.weight.abs().max() > 0.1


@pytest.mark.parametrize(("spoil", "what"), SPOILT.values(), ids=SPOILT)
def test_a_skipped_step_changes_nothing(tmp_path, spoil, what, caplog):
    module = Module(spoil)
    with caplog.at_level(logging.WARNING):
        trainer = fit(module, tmp_path, batches(6), 6, callbacks=[Finite("skip")])
    assert trainer.global_step == 6 and torch.equal(module.seen[BAD + 1], module.seen[BAD])
    assert not torch.equal(module.weight, module.seen[BAD])
    assert f"step {BAD + 1}: {what}; the step is left out" in caplog.text


def test_one_micro_batch_leaves_out_the_whole_step(tmp_path):
    module = Module(lambda loss: loss * torch.nan)
    fit(module, tmp_path, batches(6), 3, callbacks=[Finite("skip")], accumulate_grad_batches=2)
    before, after = module.seen[2], module.seen[4]
    assert torch.equal(before, after) and not torch.equal(module.weight, after)


def test_a_loss_scaler_s_overflow_is_its_own_business():
    """The scaler finds the gradient infinite, leaves the step out and scales less; nothing is raised."""
    finite, module = Finite(), Module()
    module.weight.grad = torch.full((2,), torch.inf)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()), global_step=0)
    finite.on_before_optimizer_step(trainer, module, None)
    assert module.weight.grad is not None
    trainer.precision_plugin.scaler = None
    with pytest.raises(NonFinite, match="a gradient"):
        finite.on_before_optimizer_step(trainer, module, None)
