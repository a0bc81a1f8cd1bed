from dataclasses import replace

import pytest
import torch

from infusion.metrics.measures.balance import Balance, Trial, balance, shares
from infusion.metrics.measures.estimate import mean
from infusion.metrics.measures.fisher import errors
from infusion.metrics.run.cache import Cache
from infusion.metrics.run.evaluate import evaluate
from infusion.metrics.run.options import Options
from infusion.metrics.run.stages import Stages
from infusion.metrics.run.subject import Checkpoint, Subject
from tests.infusion.metrics.conftest import ROUNDING, learn

HOW = {"samples": 4, "batch_size": 3, "steps": 2, "scale": 2.0, "strata": 2, "resamples": 20}


@pytest.fixture
def options():
    return Options(metrics=("lfd", "w2", "clip_i"), **HOW)


@pytest.fixture
def photos():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def weigher(sd, options, tools, protocol, photos):
    return Balance(Stages(sd, options, tools, Cache()), protocol.prompts("context", "cat"), "cat", photos)


def rows(likeness, base, lfd, empty):
    return torch.tensor([[likeness, base, lfd, empty]] * 3, dtype=torch.float64)


def test_closed_forms():
    assert shares(rows(0.5, 0.1, 0.02, 0.02), ceiling=0.9) == pytest.approx((0.5, 0.5))
    assert balance(rows(0.5, 0.1, 0.02, 0.02), 0.9) == pytest.approx(0.5)
    assert balance(rows(0.9, 0.1, 0.0, 0.02), 0.9) == pytest.approx(1.0)
    assert balance(rows(0.3, 0.1, 0.06, 0.02), 0.9) == pytest.approx(0.25)
    assert balance(rows(0.9, 0.1, 0.06, 0.02), 0.9) == pytest.approx(2 * 0.25 / 1.25)  # a harmonic mean
    assert balance(rows(0.1, 0.1, 0.0, 0.02), 0.9) == 0  # the base model, which kept all and gained nothing
    assert balance(rows(0.0, 0.1, 0.0, 0.02), 0.9) == 0
    assert shares(rows(0.95, 0.1, 0.0, 0.02), 0.9)[0] == 1  # more like the photos than they are


def test_means_are_weighed_not_samples():
    uneven = torch.cat([rows(0.9, 0.1, 0.0, 0.02), rows(0.1, 0.1, 0.04, 0.02)])
    assert balance(uneven, 0.9) == pytest.approx(balance(rows(0.5, 0.1, 0.02, 0.02), 0.9))


def test_what_has_learned_nothing_keeps_all_and_gains_nothing(sd, options, tools, protocol, photos):
    trial = weigher(sd, options, tools, protocol, photos).measure(Checkpoint.of(learn(sd, "infusion", steps=0)))
    said = trial.as_dict()
    assert said["lfd"] < ROUNDING and said["kept"] == pytest.approx(1)
    assert max(abs(said[name]) for name in ("gained", "balance", "w2")) < 1e-3
    assert said["empty_lfd"] > 1e-6 and said["floor"] > 1
    assert said["likeness"] == pytest.approx(said["base_likeness"], abs=1e-6)


@pytest.mark.parametrize("method", ["infusion", "dreambooth"])
def test_a_trial_has_the_report_s_own_figures(sd, options, tools, protocol, photos, method):
    checkpoint = Checkpoint.of(learn(sd, method))
    subject = Subject("cat", (checkpoint,), photos)
    figures = evaluate(sd, subject, protocol, options, Cache(), tools)["figures"]
    options = replace(options, seed=options.first_seed)  # a trial's own seeds are a training's, not a report's
    said = weigher(sd, options, tools, protocol, photos).measure(checkpoint).as_dict()
    assert said["lfd"] == pytest.approx(figures["lfd_context"]["value"], rel=1e-6) and said["lfd"] > 0
    assert said["likeness"] == pytest.approx(figures["clip_i"]["value"], rel=1e-6)
    assert said["base_likeness"] == pytest.approx(figures["clip_i"]["base"]["value"], rel=1e-6)
    assert said["ceiling"] == pytest.approx(figures["clip_i"]["ceiling"]["value"], rel=1e-6)
    assert said["w2"] == pytest.approx(figures["w2_latent"]["value"], rel=1e-6)
    assert said["floor"] == pytest.approx(figures["w2_latent"]["floor"]["value"], rel=1e-6)


def test_the_empty_prompt_s_divergence_is_the_base_model_s_alone(sd, options, tools, protocol, photos):
    weighed = weigher(sd, options, tools, protocol, photos)
    prompted, empty = (sd.guided([word], scale=1.0) for word in ("a photo of a cat", ""))
    how = (sd.schedule, [0], options.strata, "eps", weighed.regions["regions"][:1])
    found = errors(prompted, empty, weighed.base["latents"][:1], *how)
    assert weighed.empty[0].item() == pytest.approx(mean(found.values.mean(1)).value, rel=1e-3)
    single = weigher(sd, Options(**vars(options) | {"batch_size": 1}), tools, protocol, photos)
    assert torch.allclose(weighed.empty, single.empty, rtol=1e-3)


def test_too_few_samples_or_photos(sd, options, tools, protocol, photos):
    with pytest.raises(ValueError, match="samples: must be at least 2, not 1"):
        one = Options(metrics=("lfd",), **HOW | {"samples": 1})
        weigher(sd, one, tools, protocol, photos)
    with pytest.raises(ValueError, match="at least 2 photos"):
        weigher(sd, options, tools, protocol, photos[:1])


def test_a_trial_s_balance_is_of_its_rows():
    assert Trial(7, rows(0.5, 0.1, 0.02, 0.02), 0.9, 1.0, 2.0).as_dict() == pytest.approx(
        {"step": 7, "likeness": 0.5, "base_likeness": 0.1, "lfd": 0.02, "empty_lfd": 0.02, "ceiling": 0.9, "w2": 1.0}
        | {"floor": 2.0, "gained": 0.5, "kept": 0.5, "balance": 0.5}
    )
