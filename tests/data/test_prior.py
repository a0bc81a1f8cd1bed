import logging

import numpy as np
import pytest
import torch
from PIL import Image

from data.dataset import ConceptImages
from data.images import png, text_of
from data.latents import ConceptBatches, ConceptData, LatentCache
from data.prior import ClassImages
from infusion.methods.dreambooth import DreamBooth
from infusion.training.trainer import ConceptTrainer
from ldm.pipeline import StableDiffusion


@pytest.fixture
def sd(tiny):
    return StableDiffusion.from_checkpoint(tiny)


def test_images_are_the_base_models_whatever_is_being_trained(sd):
    images = ClassImages("a photo of a cat", count=3, steps=2, batch_size=2, seed=4)
    drawn = torch.cat([image for _, image in images.draw(sd, range(3))])
    expected = torch.cat([sd.sample(["a photo of a cat"], steps=2, scale=7.5, seed=4 + i) for i in range(3)])
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=0)
    module = ConceptTrainer(sd, DreamBooth(), "cat", ["a {}"])
    with torch.no_grad():
        for tensor in module.tensors.values():
            tensor.add_(0.1)
    assert not torch.equal(sd.sample(["a photo of a cat"], steps=2, seed=4), expected[:1])
    with module.unedited():
        assert torch.equal(torch.cat([image for _, image in images.draw(sd, range(3))]), drawn)
        latents = images.latents(sd)
    torch.testing.assert_close(latents, sd.vae.encode(drawn * 2 - 1), atol=1e-5, rtol=0)


def test_a_folder_keeps_its_images_and_gets_those_that_it_lacks(sd, tmp_path):
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(tmp_path / "mine.png")
    images = ClassImages("a cat", count=3, root=tmp_path, steps=2)
    latents = images.latents(sd)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["class-000000.png", "class-000001.png", "mine.png"]
    assert latents.shape == (3, 4, 8, 8)
    grey = sd.vae.encode(torch.full((1, 3, 16, 16), 200 / 127.5 - 1))
    assert (latents - grey).abs().amax((1, 2, 3)).min() < 1e-4  # mine is among them
    before = (tmp_path / "class-000001.png").read_bytes()
    assert torch.equal(images.latents(sd), latents) and (tmp_path / "class-000001.png").read_bytes() == before
    assert len(ClassImages("a cat", count=2, root=tmp_path).latents(sd)) == 2


def test_a_hole_in_the_folder_is_filled_by_the_same_image(sd, tmp_path):
    images = ClassImages("a cat", count=4, root=tmp_path, steps=2, seed=7)
    latents = images.latents(sd)
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(contents) == [f"class-00000{seed}.png" for seed in (7, 8, 9)] + ["class-000010.png"]
    (tmp_path / "class-000008.png").unlink()
    assert images.missing() == [1]
    torch.testing.assert_close(images.latents(sd), latents, atol=0.02, rtol=0)  # drawn alone, it may round otherwise
    assert all((tmp_path / name).read_bytes() == contents[name] for name in contents if name != "class-000008.png")
    assert images.missing() == []


def test_two_machines_fill_one_folder(sd, tmp_path):
    """Each begins while the other one is at work, with an image of the user's among theirs."""
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(tmp_path / "mine.png")
    first, second = (ClassImages("a cat", count=4, root=tmp_path, steps=2, batch_size=1) for _ in range(2))
    halfway, draw = [], first.draw

    def interrupted(sd, numbers):
        for number, image in zip(numbers, draw(sd, numbers), strict=True):
            if number == 1:
                halfway.append(second.latents(sd))
            yield image

    first.draw = interrupted
    assert torch.equal(first.latents(sd), halfway[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f"class-00000{i}.png" for i in range(3)), "mine.png"]


def test_the_superclass_has_its_article():
    assert ClassImages("a photo of a {}", superclass="elephant").prompt == "a photo of an elephant"
    with pytest.raises(ValueError, match="names no concept"):
        ClassImages("a photo of a {}")


@pytest.mark.parametrize("arguments", [{"prompt": " "}, {"prompt": "a cat", "count": 0}])
def test_unusable_arguments(arguments):
    with pytest.raises(ValueError, match="prior"):
        ClassImages(**arguments)


def test_batches_have_them_beside_the_same_photos():
    cache = LatentCache(torch.randn(2, 3, 4, 2, 2), torch.rand(2, 3, 1, 2, 2), torch.ones(2, 3, 6))
    prior = torch.randn(5, 4, 2, 2)
    plain = iter(ConceptBatches(cache, [["a {}"]] * 3, 4, 0.5, seed=1))
    with_prior = iter(ConceptBatches(cache, [["a {}"]] * 3, 4, 0.5, seed=1, prior=(prior, "a cat")))
    drawn = set()
    for _ in range(5):
        first, second = next(plain), next(with_prior)
        assert torch.equal(first["latents"], second["latents"]) and torch.equal(first["mask"], second["mask"])
        assert second["prior"]["template"] == ["a cat"] * 4 and "mask" not in second["prior"]
        rows = (second["prior"]["latents"][:, None] == prior).all(-1).all(-1).all(-1)  # (B, N)
        assert rows.any(1).all()
        drawn |= set(rows.int().argmax(1).tolist())
    assert len(drawn) > 2


RECIPE = {"prompt": "a cat", "seed": "7", "number": "0", "steps": "2", "scale": "7.5"}


def test_images_carry_their_recipe(sd, tmp_path):
    ClassImages("a cat", count=2, root=tmp_path, steps=2, seed=7).latents(sd)
    assert text_of(tmp_path / "class-000007.png") == RECIPE | {"base": sd.hash}
    assert text_of(tmp_path / "class-000008.png") == RECIPE | {"base": sd.hash, "seed": "8", "number": "1"}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"prompt": "a dog"}, "class-000000.png was drawn for 'a dog', not 'a cat': name another folder"),
        ({"base": "f" * 64}, "class-000000.png is of another base model: name another folder"),
        ({"steps": "50"}, ""),
        (None, ""),  # of the user's own
    ],
)
def test_images_of_something_else_are_refused(sd, tmp_path, caplog, changed, says):
    caplog.set_level(logging.INFO)
    said = None if changed is None else RECIPE | {"base": sd.hash} | changed
    (tmp_path / "class-000000.png").write_bytes(png(torch.rand(3, 16, 16), said))
    images = ClassImages("a cat", count=2, root=tmp_path, steps=2)
    if says:
        with pytest.raises(ValueError, match=f"class_root: .*{says}"):
            images.latents(sd)
        assert [path.name for path in tmp_path.iterdir()] == ["class-000000.png"]
        return
    assert len(images.latents(sd)) == 2
    before = "0 drawn before, 1 without a recipe" if changed is None else "1 drawn before (1 with other steps"
    assert f"{tmp_path}: a cat: {before}" in caplog.text and "1 drawn now" in caplog.text


@pytest.mark.parametrize("lost", range(3))
def test_any_one_image_may_be_deleted(sd, tmp_path, lost):
    images = ClassImages("a cat", count=3, root=tmp_path, steps=1)
    images.latents(sd)
    (tmp_path / f"class-00000{lost}.png").unlink()
    assert images.missing() == [lost] and len(images.latents(sd)) == 3 and images.missing() == []


def test_a_name_that_another_ending_has_is_not_free(sd, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "class-000000.jpg")
    images = ClassImages("a cat", count=2, root=tmp_path, steps=1)
    assert images.missing() == [1] and len(images.latents(sd)) == 2


def test_the_account_of_class_images(sd, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for number in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a tabby by the window")  # of other tools, which need no such noun
    (tmp_path / "1_cat").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "1_cat/0.png")
    assert len(ClassImages("a cat", count=2, root=tmp_path).latents(sd)) == 2
    said = "a cat: 0 drawn before, 3 without a recipe, as of your own, 0 drawn now; 2 of 3 are used, by name"
    assert caplog.messages[0] == f"{tmp_path}: {said}; captions (3 in .txt) are not used"
    assert caplog.messages[1].startswith(f"warning: {tmp_path}: left out: 1_cat/ (a folder of its own with 1 images")


def test_the_photos_are_not_their_own_prior(photos):
    images, prior = ConceptImages(photos, 16, "cat"), ClassImages("a cat", count=2, root=photos)
    with pytest.raises(ValueError, match="is the folder of the photos themselves"):
        ConceptData(images, prior=prior)
