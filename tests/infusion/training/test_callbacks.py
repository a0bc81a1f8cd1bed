from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.prompts import TEMPLATES
from infusion.methods.dreambooth import DreamBooth
from infusion.methods.infusion import Infusion
from infusion.sampling.sample import sample
from infusion.training.callbacks import ConceptSamples
from infusion.training.trainer import ConceptTrainer

PROMPTS = ["a photo of a {}", "a {} on a hill"]
SIZE, GAP = 16, 2  # of an image, and between two


@pytest.fixture
def module(sd) -> ConceptTrainer:
    return ConceptTrainer(sd, Infusion(), "cat", TEMPLATES)


def cells(path) -> np.ndarray:
    """The grid's images, (rows, columns, H, W, 3)."""
    pixels = np.asarray(Image.open(path))
    places = [GAP + i * (SIZE + GAP) for i in range(2)]
    return np.stack([[pixels[y : y + SIZE, x : x + SIZE] for x in places] for y in places])


def test_base_above_concept_with_the_same_seeds(module, tmp_path):
    callback = ConceptSamples(PROMPTS, every=2, steps=2, seed=4)
    trainer = SimpleNamespace(global_step=0, default_root_dir=str(tmp_path), loggers=[])
    module.trainer = None
    callback.on_train_start(trainer, module)
    for step in (0, 1, 2, 2, 3):  # step 2 is seen twice, with two micro-batches to a step
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["step=000002.png"]
    untrained = cells(tmp_path / "images" / "step=000002.png")
    assert np.abs(untrained[0].astype(int) - untrained[1]).max() <= 1  # a residual of zero changes nothing
    assert (untrained[0, 0] != untrained[0, 1]).any()

    with torch.no_grad():
        for residual in module.tensors.values():
            residual.fill_(3.0)
    trainer.global_step = 5
    callback.on_train_end(trainer, module)
    trained = cells(tmp_path / "images" / "step=000005.png")
    assert (trained[0] == untrained[0]).all()
    assert (trained[1] != untrained[1]).any()
    expected = sample(module.sd, PROMPTS, [module.concept()], steps=2, scale=7.0, seed=4)
    assert np.abs(trained[1] / 255 - expected.permute(0, 2, 3, 1).numpy()).max() < 0.003


def test_grids_go_to_tensorboard(module, tmp_path):
    from pytorch_lightning.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="tensorboard")
    trainer = SimpleNamespace(global_step=7, default_root_dir=str(tmp_path), loggers=[logger])
    module.trainer = None
    ConceptSamples(PROMPTS, steps=1).on_train_end(trainer, module)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (7, 2 * (SIZE + GAP) + GAP, 2 * (SIZE + GAP) + GAP)


def test_a_concept_is_drawn_with_the_covariance_that_it_learns_with(module, tmp_path):
    spread = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    module.inverse_covariance = spread @ spread.mT + torch.eye(32)
    with torch.no_grad():
        for residual in module.tensors.values():
            residual.fill_(3.0)
    module.trainer = None
    trainer = SimpleNamespace(global_step=2, default_root_dir=str(tmp_path), loggers=[])
    ConceptSamples(PROMPTS, steps=2, seed=4).on_train_end(trainer, module)
    settings = {"concepts": [module.concept()], "steps": 2, "scale": 7.0, "seed": 4}
    expected = sample(module.sd, PROMPTS, inverse_covariance=module.inverse_covariance, **settings)
    drawn = torch.from_numpy(cells(tmp_path / "images" / "step=000002.png")[1]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(drawn, expected, atol=1 / 255, rtol=0)
    with pytest.raises(ValueError, match="--covariance FILE"):
        sample(module.sd, PROMPTS, **settings)


@pytest.mark.parametrize("options", [{"prompts": []}, {"prompts": ["a cat"]}, {"prompts": PROMPTS, "every": 0}])
def test_mistakes(options):
    with pytest.raises(ValueError, match="^(prompts|every): "):
        ConceptSamples(**options)


def test_the_upper_row_is_the_base_model_s_though_its_weights_are_being_changed(sd, tmp_path):
    base = sd.sample(["a photo of a cat", "a cat on a hill"], steps=2, scale=7.0, seed=4)
    module = ConceptTrainer(sd, DreamBooth(), "cat", TEMPLATES)
    with torch.no_grad():
        for change in module.tensors.values():
            change.add_(0.1)
    module.trainer = None
    trainer = SimpleNamespace(global_step=2, default_root_dir=str(tmp_path), loggers=[])
    ConceptSamples(PROMPTS, steps=2, seed=4).on_train_end(trainer, module)
    drawn = cells(tmp_path / "images" / "step=000002.png")
    assert np.abs(drawn[0] / 255 - base.permute(0, 2, 3, 1).numpy()).max() < 0.003
    assert np.abs(drawn[1] / 255 - base.permute(0, 2, 3, 1).numpy()).max() > 0.1
