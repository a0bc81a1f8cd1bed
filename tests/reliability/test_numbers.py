"""A training in which a number is not finite."""

from functools import partial

import torch

from infusion.concepts.concept import Concept
from tests.reliability.runs import contents, learned, words


def spoil(number: int) -> None:
    """Makes the loss of one optimiser step NaN."""
    from infusion.training.trainer import ConceptTrainer

    denoising_loss = ConceptTrainer.denoising_loss

    def wrapped(module: ConceptTrainer, *args: object) -> torch.Tensor:
        return denoising_loss(module, *args) * (torch.nan if module.global_step == number else 1)

    ConceptTrainer.denoising_loss = wrapped


def test_it_ends_with_the_step_and_the_last_good_concept(launch, entry, whole, tmp_path):
    run = tmp_path / "run"
    ended = launch("main", *words(entry, run), prepare=partial(spoil, 3))
    assert ended.status == 2 and "Traceback" not in ended.said
    line = ended.said.rstrip().splitlines()[-1]
    assert line.startswith("error: step 4: the loss is nan; lower ")
    concept = Concept.load(run / "models/step=000003.safetensors")
    assert concept.steps == 3 and all(tensor.isfinite().all() for tensor in concept.tensors.values())
    assert torch.load(run / "models/last.ckpt", weights_only=True)["global_step"] == 3
    finished = launch("main", *words(entry, run))  # the fault was the machine's
    assert finished.status == 0, finished.said
    assert {name: data for name, data in learned(run).items() if name in learned(whole[0])} == learned(whole[0])


def test_the_step_is_left_out_where_that_is_wanted(launch, entry, whole, tmp_path):
    run = tmp_path / "run"
    ended = launch("main", *words(entry, run), "non_finite=skip", prepare=partial(spoil, 3))
    assert ended.status == 0 and "step 4: the loss is nan; the step is left out" in ended.said
    names = [f"models/step=00000{step}.safetensors" for step in (2, 4, 6)]
    same = [contents(run)[name] == contents(whole[0])[name] for name in names]
    assert same == [True, False, False]


def test_samples_that_are_not_finite_are_said_and_not_drawn(launch, entry, tmp_path):
    run = tmp_path / "run"
    ended = launch("main", *words(entry, run), prepare=black_squares)
    assert ended.status == 0, ended.said
    assert f"warning: samples at step 3 are not finite: {run}/images/step=000003.png is not written" in ended.said
    assert not (run / "images").exists() and (run / "models/step=000006.safetensors").exists()


def black_squares() -> None:
    """The autoencoder overflows."""
    from ldm.pipeline import StableDiffusion

    decode = StableDiffusion.decode
    StableDiffusion.decode = lambda sd, latents: decode(sd, latents) * torch.nan
