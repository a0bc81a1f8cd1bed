import logging
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from ldm.util.finite import Finite, NonFinite
from tests.infusion.conftest import fit

BAD = 3  # the batch, from 0, with a number that is not finite


class Module(pl.LightningModule):
    """Learns two numbers by least squares; `spoil` turns one batch's loss into another."""

    def __init__(self, spoil) -> None:
        super().__init__()
        self.spoil = spoil
        self.weight = nn.Parameter(torch.zeros(2))
        self.seen = []  # the weight before each batch

    def training_step(self, batch, batch_idx):
        self.seen.append(self.weight.detach().clone())
        loss = ((self.weight - batch["x"]) ** 2).mean()
        return self.spoil(loss) if batch_idx == BAD else loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def batches():
    return DataLoader([{"x": torch.full((2,), 2.0), "names": [f"{i}.png", "z.png"]} for i in range(6)], batch_size=None)


def no_gradient(loss):
    """The same loss with a gradient that is not finite."""
    return loss + torch.sqrt(loss * 0)


SPOILT = {
    "nan": (lambda loss: loss * torch.nan, "the loss is nan"),
    "inf": (lambda loss: loss * torch.inf, "the loss is inf"),
    "gradient": (no_gradient, "a gradient is not finite"),
}


@pytest.mark.parametrize(("spoil", "what"), SPOILT.values(), ids=SPOILT)
def test_a_fault_stops_before_it_reaches_what_is_learned_and_names_step_and_files(tmp_path, spoil, what):
    learner = Module(spoil)
    with pytest.raises(NonFinite, match=rf"^step {BAD + 1} \(a batch of {BAD}.png, z.png\): {what}; .*skip") as raised:
        fit(learner, tmp_path, batches(), 6, callbacks=[Finite()])
    assert raised.value.intact
    assert torch.equal(learner.weight, learner.seen[BAD]) and learner.weight.abs().max() > 0.1


@pytest.mark.parametrize(("spoil", "what"), SPOILT.values(), ids=SPOILT)
def test_a_skipped_step_is_counted_and_changes_nothing(tmp_path, spoil, what, caplog):
    learner, finite = Module(spoil), Finite("skip")
    with caplog.at_level(logging.WARNING):
        trainer = fit(learner, tmp_path, batches(), 6, callbacks=[finite])
    assert trainer.global_step == 6 and finite.skipped == 1
    assert torch.equal(learner.seen[BAD + 1], learner.seen[BAD])
    assert not torch.equal(learner.weight, learner.seen[BAD])
    assert f"step {BAD + 1} (a batch of {BAD}.png, z.png): {what}; the step is left out, 1 so far" in caplog.text
    other = Finite("skip")
    other.load_state_dict(finite.state_dict())
    assert other.skipped == 1


def test_one_micro_batch_leaves_out_the_whole_step_and_names_all_its_files(tmp_path, caplog):
    learner = Module(lambda loss: loss * torch.nan)
    with caplog.at_level(logging.WARNING):
        fit(learner, tmp_path, batches(), 3, callbacks=[Finite("skip")], accumulate_grad_batches=2)
    before, after = learner.seen[2], learner.seen[4]
    assert torch.equal(before, after) and not torch.equal(learner.weight, after)
    assert "step 2 (a batch of 2.png, 3.png, z.png)" in caplog.text


def test_learned_numbers_that_overflow_stop_even_where_steps_are_skipped(tmp_path, monkeypatch):
    learner = Module(lambda loss: loss)
    monkeypatch.setattr(learner, "configure_optimizers", lambda: torch.optim.SGD(learner.parameters(), lr=3e38))
    with pytest.raises(NonFinite, match=r"^step \d \(a batch of .*\): what is learned is not finite") as raised:
        fit(learner, tmp_path, batches(), 6, callbacks=[Finite("skip")])
    assert not raised.value.intact


def test_a_loss_scaler_s_overflow_is_its_own_business():
    """The scaler finds the gradient infinite, leaves the step out and scales less; nothing is raised."""
    finite = Finite()
    learner = Module(lambda loss: loss)
    learner.weight.grad = torch.full((2,), torch.inf)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()), global_step=0)
    finite.on_before_optimizer_step(trainer, learner, None)
    assert finite.skipped == 0 and learner.weight.grad is not None
    trainer.precision_plugin.scaler = None
    with pytest.raises(NonFinite, match="a gradient"):
        finite.on_before_optimizer_step(trainer, learner, None)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="non_finite: one of stop, skip"):
        Finite("ignore")
