import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from ldm.util.resume import LAST, ResumeState, StateFile, random_state, set_random_state, states
from tests.infusion.conftest import fit


class Noisy(pl.LightningModule):
    """Learns from numbers of every generator there is; remembers what it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.drawn = []

    def training_step(self, batch, batch_idx):
        draw = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])  # noqa: NPY002
        self.drawn.append(draw.tolist())
        return (self.layer(draw) - batch).pow(2).mean()

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


def train(folder, kill=None, ema=True, **options):
    pl.seed_everything(3)
    module = Noisy()
    if folder.exists():  # another process would have other numbers
        random.seed(99), np.random.seed(99), torch.manual_seed(99)  # noqa: NPY002
    callbacks = [*([EMAWeightAveraging(decay=0.9)] if ema else []), ResumeState(every=1, **options)]
    state = folder / "models" / LAST
    how = {"accumulate_grad_batches": 2, "plugins": [StateFile()]}
    callbacks += [Kill(kill)] if kill else []
    data = DataLoader(torch.ones(12), batch_size=None)  # the same throughout: a loader begins anew
    fit(module, folder, data, 6, state if state.exists() else None, callbacks, **how)
    return module


@pytest.mark.parametrize("batches", [3, 4, 7])
def test_a_killed_training_draws_and_learns_what_it_would_have(tmp_path, batches):
    """Generators, optimiser, schedule, averaged weights, and the position among the micro-batches."""
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "halted", kill=batches)
    rest = train(tmp_path / "halted")
    assert rest.drawn == whole.drawn[batches // 2 * 2 :]
    for first, second in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(first, second)


def test_the_random_state_is_data_and_comes_back(tmp_path):
    torch.save(random_state(), tmp_path / "state")
    first = random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    second = random.random(), np.random.rand(), torch.rand(3)  # noqa: NPY002
    assert first[:2] == second[:2] and torch.equal(first[2], second[2])


def test_so_many_states_are_kept_and_fewer_where_fewer_are_wanted(tmp_path):
    train(tmp_path, keep=3)
    folder = tmp_path / "models"
    assert [path.name for path in states(folder)] == [f"step={step:06d}.ckpt" for step in (6, 5, 4)]
    assert (folder / LAST).samefile(folder / "step=000006.ckpt")
    (folder / LAST).unlink()
    for path in states(folder)[1:]:
        path.unlink()
    train(tmp_path, keep=1)
    assert not states(folder) and torch.load(folder / LAST, weights_only=True)["global_step"] == 6


def test_states_of_a_file_system_without_links(tmp_path, monkeypatch):
    def link(*_: object) -> None:
        raise OSError("no links")

    monkeypatch.setattr("os.link", link)
    train(tmp_path, keep=2)
    assert (tmp_path / "models" / LAST).read_bytes() == (tmp_path / "models/step=000006.ckpt").read_bytes()


@pytest.mark.parametrize(("options", "name"), [({"every": 0}, "save_every"), ({"keep": 0}, "keep")])
def test_numbers_below_one_are_refused(options, name):
    with pytest.raises(ValueError, match=f"{name}: must be at least 1, not 0"):
        ResumeState(**options)
