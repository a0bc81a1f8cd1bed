import pytest
import torch

from infusion.attention import EditedCrossAttention
from ldm.pipeline import StableDiffusion
from scripts.benchmarks.means import Kept, sampling_means, training_means
from scripts.benchmarks.model import build_model
from scripts.benchmarks.settings import Settings
from scripts.benchmarks.timing import count_flops

SETTINGS = Settings(size="pocket", latent=8, batch=2)


@pytest.fixture(scope="module")
def pocket() -> StableDiffusion:
    return build_model(SETTINGS)


def result(case, steps=1):
    with case.ready() as run:
        return run(steps)


def test_a_guided_step_is_the_same_by_every_means(pocket):
    before = {name: tensor.clone() for name, tensor in pocket.unet.state_dict().items()}
    usual, *others = sampling_means(pocket, SETTINGS)
    expected = result(usual)
    for case in others:
        torch.testing.assert_close(result(case), expected, rtol=1e-3, atol=1e-4)
    after = pocket.unet.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert after["input_blocks.0.0.weight"].is_contiguous() and "forward" not in vars(pocket.unet)
    assert not any(isinstance(module, Kept | EditedCrossAttention) for module in pocket.unet.modules())


def test_a_first_optimiser_step_has_the_same_loss_by_every_means(pocket):
    losses = [result(training_means(pocket, SETTINGS)[i]) for i in range(5)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=1e-6)
    assert "forward" not in vars(pocket.unet)


def test_what_each_means_saves_in_operations(pocket):
    usual, two_calls, channels_last, kept = (count_flops(case) for case in sampling_means(pocket, SETTINGS))
    assert kept < usual == channels_last < two_calls  # the mass of unconditional rows is nobody's
    usual, encoding, checkpointing, ending, fused = (count_flops(case) for case in training_means(pocket, SETTINGS))
    assert encoding > usual and checkpointing > usual and ending < usual and fused == usual
