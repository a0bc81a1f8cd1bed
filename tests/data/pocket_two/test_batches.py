from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.pocket_two import batches
from data.pocket_two.batches import LatentBatches, LatentWorldData, WorldBatches, table_of, words_of
from data.pocket_two.identity import ROLES, FamilyBatches, draw_family, draw_look_alike, mush, tell_again
from data.pocket_two.judge import truth_of
from data.pocket_two.prompted import PromptedBatches
from data.pocket_two.reading import last_token
from data.pocket_two.scene import CHOICES, COLOURS, Placed, Scene, Thing
from data.pocket_two.textures import Texture
from data.pocket_two.world import World, draw_scene
from ldm.models.autoencoder import AutoencoderKL


def test_a_table_keeps_every_word():
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(300)]
    assert words_of(table_of(scenes)) == [scene.words() for scene in scenes]


def test_batches_depend_on_seed_and_index_and_can_be_resumed():
    batches = iter(WorldBatches(4, seed=1))
    first, second = next(batches), next(batches)
    again = next(iter(WorldBatches(4, seed=1, start=1)))
    assert torch.equal(second["images"], again["images"]) and second["captions"] == again["captions"]
    assert not torch.equal(first["images"], second["images"])


def test_crops_are_cut_from_scenes():
    batch = next(iter(WorldBatches(6, seed=2, crop=32)))
    assert batch["images"].shape == (6, 3, 32, 32)
    assert batch["images"].min() >= -1 and batch["images"].max() <= 1


def latents_of(table: torch.Tensor) -> dict[str, torch.Tensor]:
    shape = (len(table), 12)
    return {"latents": torch.ones(*shape, 4, 4).half(), "halves": torch.zeros(*shape, 2, 2).half(), "table": table}


def test_captions_of_latents_are_drawn_anew_each_time():
    rng = np.random.default_rng(3)
    table = table_of([draw_scene(rng, pairs=0.0) for _ in range(3)])
    batch = next(iter(LatentBatches(**latents_of(table), batch_size=64, seed=0, places_alone=0.5)))
    assert batch["latents"].shape == (64, 12, 4, 4) and batch["latents"].dtype == torch.float32
    assert len(set(batch["captions"])) > 20
    alone = [words for words in batch["captions"] if words in ("in the middle", "on the left", "on the right",
                                                               "at the top", "at the bottom")]  # fmt: skip
    assert 16 < len(alone) < 48


def test_the_first_batches_are_of_half_the_side_and_of_twice_as_many():
    table = table_of([draw_scene(np.random.default_rng(4))])
    latents = latents_of(table)
    batches = iter(LatentBatches(**latents, batch_size=3, seed=0, half_steps=2))
    shapes = [tuple(next(batches)["latents"].shape) for _ in range(4)]
    assert shapes == [(6, 12, 2, 2)] * 2 + [(3, 12, 4, 4)] * 2
    resumed = next(iter(LatentBatches(**latents, batch_size=3, seed=0, start=1, half_steps=2)))
    assert resumed["latents"].shape == (6, 12, 2, 2)


def test_encoded_scenes_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "SHARD", 100)
    vae = AutoencoderKL(ch=4, ch_mult=[1, 1, 1], num_res_blocks=1, z_channels=2, embed_dim=2, mid_attention=False,
                        norm_groups=1)  # fmt: skip

    def data() -> LatentWorldData:
        made = LatentWorldData(batch_size=2, count=100, cache=str(tmp_path), seed=3)
        made.trainer = SimpleNamespace(
            global_step=0,
            lightning_module=SimpleNamespace(sd=SimpleNamespace(vae=vae)),
            strategy=SimpleNamespace(root_device="cpu"),
            precision_plugin=SimpleNamespace(forward_context=torch.no_grad),
        )
        made.setup("fit")
        return made

    first = data()
    drawn = next(iter(WorldBatches(100, seed=3)))
    assert torch.equal(first.parts["table"], drawn["table"])
    assert torch.equal(first.parts["latents"], vae.encode(drawn["images"]).half())
    assert first.parts["halves"].shape == (100, 2, 8, 8)
    monkeypatch.setattr(LatentWorldData, "encode", None)  # nothing is encoded again
    assert torch.equal(data().parts["latents"], first.parts["latents"])
    assert next(iter(first.train_dataloader()))["latents"].shape == (2, 2, 16, 16)
    vae.decoder.conv_out.bias.data += 1
    with pytest.raises(ValueError, match="another autoencoder"):
        data()


def test_the_reader_hears_of_objects_from_left_to_right():
    red = Placed(Thing("cat", colour="red"), place="right")
    striped = Thing("boot", colour="blue", second="white", textures=(Texture("striped", 0.0, 3.0),))
    scene = Scene("photo", "grass", (red, Placed(striped, place="left")))
    labels, there = truth_of(table_of([scene]))
    assert there.tolist() == [[True, True]] and labels["count"].tolist() == [1]
    assert [CHOICES["noun"][i] for i in labels["noun"][0]] == ["boot", "cat"]
    present = [{name for name, is_there in zip(COLOURS, row, strict=True) if is_there} for row in labels["colours"][0]]
    assert present == [{"blue", "white"}, {"red"}]


def test_a_natural_object_has_no_named_colour():
    labels, there = truth_of(table_of([Scene("photo", "grass", (Placed(Thing("cat")),))]))
    assert labels["colours"].sum() == 0 and there.tolist() == [[True, False]] and labels["count"].tolist() == [0]


def test_masks_of_absent_things_are_empty():
    batch = next(iter(PromptedBatches(64, seed=4, absent=1.0)))
    empty = batch["masks"].sum((2, 3)) == 0
    assert not empty[:, 0].any() and 0.4 < empty[:, 1].float().mean() < 0.95  # scenes of one object
    assert batch["masks"].min() >= 0 and batch["masks"].max() <= 1


def test_a_family_has_an_object_and_what_is_less_like_it():
    rng = np.random.default_rng(5)
    for _ in range(100):
        thing, words, noun, other, look_alike = draw_family(rng)
        assert words.noun == noun.noun == thing.noun and words.texture == thing.texture
        assert (words.colour, words.second) == (thing.colour, thing.second)
        assert other.noun != thing.noun and other.textures == thing.textures
        assert look_alike != thing
    batch = next(iter(FamilyBatches(2, seed=6)))
    assert batch["first"].shape == batch["second"].shape == (2 * len(ROLES), 3, 64, 64)
    assert batch["spoiled"].shape == (2, 3, 64, 64) and batch["same"].diagonal().all()


def test_look_alikes_are_others():
    rng = np.random.default_rng(7)
    thing = Thing("car", "fluent", "red", "white", (Texture("ringed", 0.0, 3.4), Texture("rayed", 0.0, 5.0)))
    assert all(draw_look_alike(thing, rng) != thing for _ in range(200))
    assert all(tell_again(thing, rng).texture == thing.texture for _ in range(20))


def test_spoiling_changes_the_object_alone():
    world, rng = World(), np.random.default_rng(8)
    thing = Thing("cat", "noto", "red", "white", (Texture("striped", 0.0, 3.0),))
    images, masks = world.render([Scene("photo", "grass", (Placed(thing, "large"),))] * 3, rng)
    for way in range(3):
        spoiled = mush(images, masks[:, :1], rng, way)
        outside = (masks[:, :1] == 0).expand_as(images)
        assert torch.equal(spoiled[outside], images[outside])
        assert ((spoiled - images).abs() * masks[:, :1]).sum() / masks[:, :1].sum() > 0.1


def test_a_word_ends_at_its_last_token():
    assert last_token([9, 1, 2, 3, 2, 3], [2, 3]) == 3
