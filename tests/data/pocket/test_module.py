import numpy as np
import pytest
import torch

from data.pocket.module import LatentBatches, LatentWorldData, WorldBatches, labels, scenes
from data.pocket.world import NOUNS, PLACE_WORDS, PLACES, Scene, caption, untrained


def take(stream, count):
    iterator = iter(stream)
    return [next(iterator) for _ in range(count)]


def test_labels_and_scenes_are_inverse():
    table = [
        Scene("cat", "photo", "natural", "plain", "small", "grass", "left"),
        Scene(NOUNS[-1], "cartoon", "white", "dotted", "large", "fabric", "bottom"),
    ]
    assert scenes(labels(table)) == table


def test_stream_resumes_where_it_stopped():
    whole, rest = take(WorldBatches(3, seed=7), 3), take(WorldBatches(3, seed=7, start=2), 1)
    assert torch.equal(whole[2]["images"], rest[0]["images"]) and whole[2]["captions"] == rest[0]["captions"]
    assert not torch.equal(whole[0]["images"], whole[1]["images"])


def test_images_lie_in_the_range_of_the_autoencoder():
    batch = take(WorldBatches(8, seed=0), 1)[0]
    assert batch["images"].shape == (8, 3, 64, 64) and batch["labels"].shape == (8, 7) and len(batch["captions"]) == 8
    assert -1 <= batch["images"].min() < -0.5 and 0.5 < batch["images"].max() <= 1


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_siblings_differ_from_the_scene_before_in_one_part(share):
    batches = WorldBatches(400, seed=0, siblings=share)
    drawn = batches.scenes(np.random.default_rng(1))
    apart = (labels(drawn[1:]) != labels(drawn[:-1])).sum(1)  # parts that changed
    assert (apart == 1).float().mean().item() == pytest.approx(share, abs=0.08)
    assert not any(map(untrained, drawn))


def test_captions_are_complete_half_of_the_time_with_siblings():
    for share, low, high in ((0.0, 0.05, 0.25), (0.5, 0.45, 0.7)):  # some drop nothing by chance
        batch = take(WorldBatches(200, seed=0, siblings=share), 1)[0]
        whole = [
            caption(scene) == words for scene, words in zip(scenes(batch["labels"]), batch["captions"], strict=True)
        ]
        assert low < sum(whole) / 200 < high


def test_latent_batches_pair_each_latent_with_its_own_caption():
    table = labels([Scene(noun, "photo", "natural", "plain", "medium", "grass", "left") for noun in NOUNS])
    latents = torch.arange(len(NOUNS)).view(-1, 1, 1, 1).half()
    for batch in take(LatentBatches(latents, table, 16, seed=1), 4):
        for latent, words in zip(batch["latents"], batch["captions"], strict=True):
            assert NOUNS[int(latent)] in words


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_some_captions_say_the_place_alone(share):
    table = labels([Scene("cat", "photo", "red", "plain", "medium", "grass", place) for place in PLACES])
    latents = torch.arange(len(PLACES)).view(-1, 1, 1, 1).half()
    batch = take(LatentBatches(latents, table, 500, seed=1, places_alone=share), 1)[0]
    alone = 0
    for latent, words in zip(batch["latents"], batch["captions"], strict=True):
        alone += words == PLACE_WORDS[list(PLACES)[int(latent)]]
        assert "cat" in words or words in PLACE_WORDS.values()
    assert alone / 500 == pytest.approx(share, abs=0.06)


def test_cache_of_another_autoencoder_is_refused(tmp_path):
    class Trainer:
        class precision_plugin:
            @staticmethod
            def forward_context():
                return torch.no_grad()

    def data(weight: float) -> LatentWorldData:
        vae = torch.nn.Conv2d(3, 4, 4, stride=4)
        torch.nn.init.constant_(vae.weight, weight)
        vae.encode = vae.forward
        module = type("Module", (), {"sd": type("Model", (), {"vae": vae})})
        result = LatentWorldData(batch_size=2, count=100, cache=str(tmp_path / "latents.safetensors"))
        result.trainer = Trainer()
        result.trainer.lightning_module = module
        return result

    first = data(0.1)
    first.setup("fit")
    assert first.latents.shape == (100, 4, 16, 16)
    again = data(0.1)
    torch.nn.init.zeros_(again.trainer.lightning_module.sd.vae.bias)
    torch.nn.init.zeros_(first.trainer.lightning_module.sd.vae.bias)
    with pytest.raises(ValueError, match="another autoencoder"):
        data(0.3).setup("fit")
