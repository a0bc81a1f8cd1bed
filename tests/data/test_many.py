import shutil

import pytest
import torch

from data.dataset import ConceptImages
from data.latents import ConceptData
from data.many import ManyConcepts, entries
from tests.data.conftest import attached


def listed(photos, tmp_path) -> list[dict]:
    """Two concepts with photos of their own; the second's captions call it a stuffed animal."""
    bears = tmp_path / "bears"
    if not bears.exists():
        shutil.copytree(photos, bears)
        (bears / "2.png").unlink()
        (bears / "0.txt").write_text("my stuffed animal\n")
    bear = {"name": "bear", "superclass": "stuffed animal", "data_root": str(bears), "flip_p": 0.0}
    return [{"name": "cat", "superclass": "cat", "data_root": str(photos)}, bear]


@pytest.mark.parametrize("step", [0, 3])
def test_every_concept_gets_the_batches_of_its_own_data_module(photos, tmp_path, vae, step):
    listing, options = listed(photos, tmp_path), {"batch_size": 5, "templates": ["a photo of a {}", "{}"], "seed": 3}
    loaders = attached(ManyConcepts(listing, 16, flip_p=0.7, **options), vae, step).train_dataloader()
    assert list(loaders) == ["cat", "bear"]
    for entry, flip_p in zip(listing, (0.7, 0.0), strict=True):
        images = ConceptImages(entry["data_root"], 16, entry["superclass"])
        alone = iter(attached(ConceptData(images, flip_p=flip_p, **options), vae, step).train_dataloader())
        for batch, expected in zip(iter(loaders[entry["name"]]), [next(alone) for _ in range(3)], strict=False):
            assert torch.equal(batch["latents"], expected["latents"]) and torch.equal(batch["mask"], expected["mask"])
            assert batch["template"] == expected["template"]


def test_whole_images_need_no_masks(photos, tmp_path, vae):
    listing = listed(photos, tmp_path)
    shutil.rmtree(photos / "mask")
    loaders = attached(ManyConcepts(listing, 16, mask="none"), vae).train_dataloader()
    assert all(set(next(iter(loader))) == {"latents", "names", "sizes", "template"} for loader in loaders.values())


def test_the_list_is_read():
    given = [
        {"name": "my-cat_2", "superclass": "cat", "data_root": "photos/cat"},
        {"name": "b", "superclass": "stuffed animal", "data_root": "x", "flip_p": 0},
    ]
    cat, bear = entries(given)
    assert (cat.name, cat.superclass, cat.data_root, cat.flip_p) == ("my-cat_2", "cat", "photos/cat", None)
    assert bear.superclass == "stuffed animal" and bear.flip_p == 0


CAT = {"name": "cat", "superclass": "cat", "data_root": "x"}


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        ([], "concepts: a list is wanted"),
        ("object", "concepts: a list is wanted"),
        ([CAT, "dog"], r"concepts\.1: a mapping"),
        ([CAT, {**CAT, "nmae": "dog"}], r"concepts\.1\.nmae: .* did you mean `name`"),
        ([{"name": "cat", "data_root": "x"}], r"concepts\.0: .*`superclass`"),
        ([{**CAT, "name": 3}], r"concepts\.0\.name: .*wants str"),
        ([{**CAT, "flip_p": "often"}], r"concepts\.0\.flip_p"),
        ([{**CAT, "name": "../cat"}], r"concepts\.0\.name: .*folder"),
        ([{**CAT, "superclass": " "}], r"concepts\.0\.superclass"),
        ([CAT, {**CAT, "superclass": "dog"}], r"concepts\.1\.name: there is another 'cat'"),
    ],
)
def test_mistakes_in_the_list(listing, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        entries(listing)


def test_mistakes_in_the_photos_name_the_concept(photos, tmp_path, vae):
    listing = listed(photos, tmp_path)
    with pytest.raises(ValueError, match=r"^concepts\.bear: data_root: there is no folder nowhere"):
        ManyConcepts([listing[0], {**listing[1], "data_root": "nowhere"}], 16)
    with pytest.raises(ValueError, match=r"^concepts\.bear: flip_p: must be between 0 and 1, not 2"):
        ManyConcepts([listing[0], {**listing[1], "flip_p": 2}], 16)
