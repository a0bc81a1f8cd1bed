import logging
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from data.dataset import ConceptImages
from data.latents import ConceptBatches, ConceptData, LatentCache, photo_sizes
from ldm.models.autoencoder import coverage
from tests.data.conftest import attached


@pytest.fixture
def images(photos) -> ConceptImages:
    return ConceptImages(photos, 16, "cat")


def first(batches: ConceptBatches, count: int) -> list[dict]:
    return list(islice(batches, count))


def counted(sides: int, photos: int) -> LatentCache:
    """Latents whose value is 10 · side + photo."""
    values = 10 * torch.arange(sides).view(-1, 1) + torch.arange(photos)
    return LatentCache(values.view(sides, photos, 1, 1, 1).float(), None, values[..., None].expand(-1, -1, 6))


@torch.no_grad()
def test_every_photo_and_its_mirror_image_is_encoded(images, vae):
    cache = LatentCache.encode(images, vae, flip=True)
    assert cache.latents.shape == (2, 3, 4, 8, 8) and cache.masks.shape == (2, 3, 1, 8, 8)
    assert torch.allclose(cache.latents[0], vae.encode(images.images), atol=1e-6)
    assert torch.allclose(cache.latents[1], vae.encode(images.images.flip(-1)), atol=1e-6)
    assert not torch.allclose(cache.latents[1], cache.latents[0].flip(-1), atol=1e-3)  # not merely mirrored latents
    assert torch.equal(cache.masks[0], F.avg_pool2d(images.masks, 2))
    assert torch.equal(cache.masks[1], cache.masks[0].flip(-1))
    assert LatentCache.encode(images, vae, flip=False).latents.shape[0] == 1


@pytest.mark.parametrize("offset", range(8))
def test_a_thin_part_of_a_mask_counts_the_same_wherever_it_lies(offset):
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., 16 + offset : 19 + offset] = 1  # 3 pixels wide, at a factor of 8
    small = coverage(masks, (8, 8))
    assert small.shape == (1, 1, 8, 8) and small.sum().item() == pytest.approx(8 * 3 / 8)
    assert (small[0, 0, 0, 2] + small[0, 0, 0, 3]).item() == pytest.approx(3 / 8)


def test_sizes_are_of_the_photo_the_crop_in_the_resized_photo_and_the_square():
    own, mirrored = photo_sizes(1500, 1000, 512)
    assert own == [1000, 1500, 0, 128, 512, 512]  # resized to 768 × 512; height before width
    assert mirrored == own
    own, mirrored = photo_sizes(1003, 1000, 1000)
    assert (own[3], mirrored[3]) == (1, 2)  # of three columns too many, the mirror image lacks the other ones
    assert photo_sizes(700, 1400, 350)[0] == [1400, 700, 175, 0, 350, 350]
    assert photo_sizes(700, 1400, 350, (0.5, 1.0))[0] == [1400, 700, 350, 0, 350, 350]
    own, mirrored = photo_sizes(1500, 1000, 512, (0.25, 0.5))
    assert (own[3], mirrored[3]) == (64, 192)


def test_every_photo_and_its_mirror_image_keep_their_sizes(images, vae):
    cache = LatentCache.encode(images, vae, flip=True)
    assert cache.sizes.shape == (2, 3, 6) and cache.sizes.dtype == torch.int64
    assert cache.sizes[0].tolist() == [[20, 24, 0, 1, 16, 16]] * 3  # 24 × 20 becomes 19 × 16
    assert cache.sizes[1].tolist() == [[20, 24, 0, 2, 16, 16]] * 3
    batch = first(ConceptBatches(counted(2, 5), [["{}"]] * 5, 20, flip_p=0.5), 1)[0]
    assert torch.equal(batch["sizes"], batch["latents"].view(20, 1).long().expand(-1, 6))


def test_overflow_is_not_trained_on(images, vae, monkeypatch):
    monkeypatch.setattr(vae, "encode", lambda photo: torch.full((1, 4, 8, 8), torch.inf))
    with pytest.raises(ValueError, match="overflows in torch.float32"):
        LatentCache.encode(images, vae, flip=False)


def test_batches_depend_on_seed_and_index_alone():
    def draw(**options) -> list[tuple[list[float], list[str]]]:
        batches = ConceptBatches(counted(2, 5), [["a {}", "the {}"]] * 5, 6, **({"flip_p": 0.5, "seed": 1} | options))
        return [(batch["latents"].flatten().tolist(), batch["template"]) for batch in first(batches, 4)]

    assert draw() == draw()
    assert draw(start=2)[:2] == draw()[2:]
    assert draw()[0] != draw()[1]
    assert draw() != draw(seed=2)


def test_processes_share_what_one_would_draw():
    templates = [["a {}", "the {}"]] * 5
    prior = torch.arange(9.0).view(9, 1, 1, 1), "a dog"

    def draw(rows: int, **options) -> list[dict]:
        return first(ConceptBatches(counted(2, 5), templates, rows, 0.5, 1, prior=prior, **options), 3)

    parts = zip(draw(2, rank=0, world=3), draw(2, rank=1, world=3), draw(2, rank=2, world=3), strict=True)
    for whole, some in zip(draw(6), parts, strict=True):
        assert torch.equal(whole["latents"], torch.cat([part["latents"] for part in some]))
        assert whole["template"] == [template for part in some for template in part["template"]]
        assert torch.equal(whole["prior"]["latents"], torch.cat([part["prior"]["latents"] for part in some]))


def test_photos_sides_and_templates_are_drawn_as_often_as_they_should():
    batches = ConceptBatches(counted(2, 4), [["a {}", "the {}"]] * 4, 4000, flip_p=0.25)
    batch = first(batches, 1)[0]
    side, photo = batch["latents"].flatten().div(10, rounding_mode="floor"), batch["latents"].flatten() % 10
    assert side.mean().item() == pytest.approx(0.25, abs=0.03)
    assert (photo.bincount() if photo.dtype == torch.int64 else photo.long().bincount()).tolist() == pytest.approx(
        [1000] * 4, abs=100
    )
    assert batch["template"].count("a {}") == pytest.approx(2000, abs=130)


@pytest.mark.parametrize(("flip_p", "side"), [(0.0, 0), (1.0, 1)])
def test_never_and_always_mirrored(flip_p, side):
    batch = first(ConceptBatches(counted(2, 3), [["{}"]] * 3, 50, flip_p=flip_p), 1)[0]
    assert set((batch["latents"] // 10).flatten().tolist()) == {side}


def test_the_data_module_gives_latents_masks_and_templates(images, vae):
    data = attached(ConceptData(images, batch_size=5, templates=["a photo of a {}"], seed=3), vae)
    batch = next(iter(data.train_dataloader()))
    assert batch["latents"].shape == (5, 4, 8, 8) and batch["mask"].shape == (5, 1, 8, 8)
    assert batch["template"] == ["a photo of a {}"] * 5
    cache = data.cache.latents.flatten(0, 1)
    matches = [next(i for i in range(6) if torch.equal(latents, cache[i])) for latents in batch["latents"]]
    assert torch.equal(batch["mask"], data.cache.masks.flatten(0, 1)[matches])


def test_the_photos_are_reported_once_and_small_ones_warned_of(photos, vae, caplog):
    caplog.set_level(logging.INFO)
    data = attached(ConceptData(ConceptImages(photos, 44, "cat")), vae)
    images = data.images
    expected = [("INFO", f"{photos}: {images.report()}"), ("WARNING", f"warning: {photos}: {images.enlarged()}")]
    assert images.enlarged() and [(record.levelname, record.message) for record in caplog.records] == expected


def test_a_size_that_the_model_cannot_halve_is_refused(photos, vae):
    with pytest.raises(ValueError, match="image_size: height must be a multiple of 4 pixels, not 18"):
        attached(ConceptData(ConceptImages(photos, 18, "cat")), vae)


def test_a_resumed_run_goes_on_with_the_next_batch(images, vae):
    data = attached(ConceptData(images, seed=3), vae)
    fourth = first(data.train_dataloader(), 5)[4]
    resumed = attached(ConceptData(images, seed=3), vae, global_step=2)  # of two batches each
    assert torch.equal(next(iter(resumed.train_dataloader()))["latents"], fourth["latents"])


def test_captions_take_the_place_of_templates(photos, vae):
    for i in range(3):
        (photos / f"{i}.txt").write_text(f"cat number {i}\n")
    data = attached(ConceptData(ConceptImages(photos, 16, "cat", mask="none"), batch_size=8, flip_p=0.0), vae)
    batch = next(iter(data.train_dataloader()))
    assert "mask" not in batch
    for latents, template in zip(batch["latents"], batch["template"], strict=True):
        assert torch.equal(latents, data.cache.latents[0, int(template.removeprefix("{} number "))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: must be from 1"),
        ({"flip_p": 1.5}, "flip_p: must be between 0 and 1"),
        ({"templates": []}, "templates: at least one"),
        ({"templates": ["a photo"]}, "templates: 'a photo' must have {} for the concept"),
        ({"templates": ["a {} by a {thing}"]}, "no other braces"),
    ],
)
def test_mistakes(images, options, message):
    with pytest.raises(ValueError, match=message):
        ConceptData(images, **options)
