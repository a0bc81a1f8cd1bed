import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clipseg.model import ClipSeg
from clipseg.training import ClipSegTraining, contrast
from clipseg.weights import POCKET_CONFIG
from data.pocket.prompted import draw_batch
from data.pocket.world import World
from ldm.config import build, find, load_config, resolve
from ldm.tokenizer import Tokenizer


@pytest.fixture
def module(small_config) -> ClipSegTraining:
    torch.manual_seed(0)
    tokenizer = Tokenizer(merges=1000, context_length=32)
    module = ClipSegTraining(ClipSeg(small_config(tokenizer.vocab_size, tokenizer.eos, 32), tokenizer, 64))
    module.log_dict = lambda values, **options: module.logged.append(values)
    module.logged = []
    return module


def squares() -> dict:
    """Eight images of a red square and a green one, at different places."""
    images, masks = torch.full((8, 3, 64, 64), -1.0), torch.zeros(8, 2, 64, 64)
    for i in range(8):
        places = [(16 * (i % 4), 0), (16 * (3 - i % 4), 32)]
        for p, (x, y) in enumerate(places if i < 4 else places[::-1]):
            masks[i, p, y : y + 32, x : x + 16] = 1
            images[i, p, y : y + 32, x : x + 16] = 1
    nouns = [["cat"] * 8, ["dog"] * 8]
    prompts = [[f"a photo of a {noun}" for noun in row] for row in nouns]
    return {"images": images, "masks": masks, "prompts": prompts, "nouns": nouns}


def temperature(value: float) -> SimpleNamespace:
    return SimpleNamespace(logit_scale=torch.tensor(value))


def test_contrast_of_features_that_tell_nothing_is_that_of_guessing():
    same = torch.eye(4, dtype=torch.bool)
    loss = contrast(torch.ones(4, 8), torch.ones(4, 8), same, temperature(2.0))
    assert loss.item() == pytest.approx(math.log(4))


def test_contrast_vanishes_when_each_finds_its_own():
    features, same = torch.eye(4, 8), torch.eye(4, dtype=torch.bool)
    assert contrast(features, 3 * features, same, temperature(4.0)).item() < 1e-6
    assert contrast(features, features.roll(1, 0), same, temperature(4.0)).item() > 10


def test_texts_of_one_noun_share_the_right_answer():
    """Two texts name the first region: the best that it can do is to give each half."""
    images, texts = torch.eye(2, 8), torch.eye(2, 8)[[0, 0, 1]]
    same = torch.tensor([[True, True, False], [False, False, True]])
    loss = contrast(images, texts, same, temperature(4.6))
    assert loss.item() == pytest.approx(math.log(2) / 5, abs=1e-4)


def test_a_text_of_no_region_is_only_a_wrong_answer():
    images, same, texts = torch.eye(2, 8), torch.eye(2, 3, dtype=torch.bool), torch.eye(3, 8)
    near = contrast(images, torch.cat([texts[:2], texts[:1]]), same, temperature(4.0))
    assert near > contrast(images, texts, same, temperature(4.0)) + 0.1


def test_regions_are_the_tokens_under_each_mask(module):
    tokens, masks = torch.randn(2, 1 + 4 * 4, 32), torch.zeros(2, 3, 64, 64)
    masks[0, 0, :16, :16] = 1  # one patch, too little
    masks[0, 1, :32, :32] = 1
    masks[1, 2] = 0.5
    features, shown = module.regions(tokens, masks)
    assert shown.tolist() == [False, False, True, False, False, True]  # prompt by prompt, image by image
    patches, clip = tokens[:, 1:].unflatten(1, (4, 4)), module.clipseg.network.clip
    expected = torch.stack([patches[0, :2, :2].mean((0, 1)), patches[1].mean((0, 1))])
    expected = clip.visual_projection(clip.vision_model.post_layernorm(expected))
    torch.testing.assert_close(features[shown], expected)


def test_it_learns_to_tell_two_objects_apart(module):
    """The prompt decides which square is masked."""
    batch = squares()
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()
    assert module.logged[0]["train/iou"] < 0.4 and module.logged[-1]["train/iou"] > 0.9
    found = module.clipseg.eval().masks((batch["images"] + 1) / 2, ["a photo of a dog"]) > 0.5
    assert (found == (batch["masks"][:, 1] > 0.5)).float().mean() > 0.97


def test_the_loss_is_the_cross_entropy_of_every_pixel(module):
    for parameter in module.clipseg.network.decoder.parameters():
        parameter.data.zero_()
    final = module.clipseg.network.decoder.transposed_convolution[4]
    final.bias.data.fill_(2.0)
    batch = squares()
    share = batch["masks"].mean().item()
    chance = torch.tensor(2.0).sigmoid()
    expected = -share * chance.log() - (1 - share) * (1 - chance).log()
    module.training_step(batch, 0)
    assert module.logged[-1]["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_parameter_is_trained(module):
    module.training_step(squares(), 0).backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_the_config_trains_a_network_of_at_most_three_megabytes_in_half_precision():
    module = build(resolve(load_config(find(POCKET_CONFIG))).model, "model")
    weights = module.weights()
    assert 2 * sum(t.numel() for t in weights.values()) < 2.9e6
    assert {name.split(".")[0] for name in weights} == {"clip", "decoder"}
    module.log_dict = lambda values, **options: None
    assert 0.3 < module.training_step(draw_batch(World(), np.random.default_rng(0), 4), 0).item() < 3
