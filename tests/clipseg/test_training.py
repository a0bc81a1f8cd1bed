from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from clipseg.model import ClipSeg
from clipseg.training import ClipSegTraining
from clipseg.weights import POCKET_CONFIG
from data.pocket.prompted import draw_batch
from data.pocket.world import World
from ldm.models.tokenizer import Tokenizer
from ldm.util.config import find, instantiate, load_config, resolve


@pytest.fixture
def clip(small_config, randomise, tmp_path) -> Path:
    """A file of a CLIP's values."""
    tokenizer = Tokenizer(merges=1000, context_length=32)
    model = ClipSeg(small_config(tokenizer.vocab_size, tokenizer.eos, 32), tokenizer, 64)
    randomise(model, 3)
    save_file(model.network.clip.state_dict(), tmp_path / "clip.safetensors")
    return tmp_path / "clip.safetensors"


@pytest.fixture
def module(small_config, clip) -> ClipSegTraining:
    torch.manual_seed(0)
    tokenizer = Tokenizer(merges=1000, context_length=32)
    module = ClipSegTraining(ClipSeg(small_config(tokenizer.vocab_size, tokenizer.eos, 32), tokenizer, 64), clip)
    module.log_dict = lambda values, **options: module.logged.append(values)
    module.logged = []
    return module


def boxes() -> dict:
    """Eight images of a white box at different places, and a prompt for what is not there."""
    images, masks = torch.full((8, 3, 64, 64), -1.0), torch.zeros(8, 2, 64, 64)
    for i in range(8):
        y, x = 32 * (i // 4), 16 * (i % 4)
        images[i, :, y : y + 32, x : x + 16] = 1
        masks[i, 0, y : y + 32, x : x + 16] = 1
    return {"images": images, "masks": masks, "prompts": [["a box"] * 8, ["my striped cat in the night sky"] * 8]}


def test_it_learns_where_a_thing_is_and_that_another_is_not(module):
    batch = boxes()
    optimizer = torch.optim.AdamW(module.clipseg.network.decoder.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    assert module.logged[0]["train/iou"] < 0.4 and module.logged[-1]["train/iou"] > 0.9
    found = module.clipseg.eval().masks((batch["images"] + 1) / 2, ["a box"]) > 0.5
    assert (found == (batch["masks"][:, 0] > 0.5)).float().mean() > 0.97


def test_the_loss_is_the_cross_entropy_of_every_pixel(module):
    for parameter in module.clipseg.network.decoder.parameters():
        parameter.data.zero_()
    final = module.clipseg.network.decoder.transposed_convolution[4]
    final.bias.data.fill_(2.0)
    batch = boxes()
    share = batch["masks"].mean().item()
    chance = torch.tensor(2.0).sigmoid()
    expected = -share * chance.log() - (1 - share) * (1 - chance).log()
    assert module.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_decoder_is_trained_and_clip_is_that_of_the_file(module, clip):
    module.training_step(boxes(), 0).backward()
    trained = {name for name, parameter in module.clipseg.network.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in module.clipseg.network.named_parameters() if name.startswith("decoder.")}
    assert trained == set(module.weights())
    with safe_open(clip, "pt") as file:
        for name, tensor in module.clipseg.network.clip.state_dict().items():
            assert torch.equal(tensor, file.get_tensor(name)), name


def test_a_clip_that_does_not_fit_is_refused(small_config, clip):
    tokenizer = Tokenizer(merges=500, context_length=32)
    other = ClipSeg(small_config(tokenizer.vocab_size, tokenizer.eos, 32), tokenizer, 64)
    with pytest.raises(ValueError, match="clip.safetensors: 1 tensors have another shape: .*token_embedding"):
        ClipSegTraining(other, clip)


def test_the_config_trains_a_decoder_of_less_than_two_megabytes_in_half_precision():
    module = instantiate(resolve(load_config(find(POCKET_CONFIG))).model, "model")
    assert 2 * sum(tensor.numel() for tensor in module.weights().values()) < 2e6
    module.log_dict = lambda values, **options: None
    loss = module.training_step(draw_batch(World(), np.random.default_rng(0), 4), 0).item()
    assert 0.3 < loss < 3  # of one that guesses: 0.69
