from dataclasses import replace

import numpy as np
import pytest
import torch

from data.pocket.backgrounds import BACKGROUNDS
from data.pocket.leakage import leakage, patches
from data.pocket.world import STYLES, World, draw_scene


def scenes(background, style, count=2, seed=11):
    rng = np.random.default_rng(seed)
    pick = [replace(draw_scene(rng, None), background=background, style=style) for _ in range(count)]
    images, masks = World().render(pick, rng)
    return images, masks[:, 0]


@pytest.mark.parametrize("style", STYLES)
def test_every_pair_of_backgrounds_can_be_told_apart(style):
    rendered = {name: scenes(name, style) for name in BACKGROUNDS}
    for training in BACKGROUNDS:
        others = [name for name in BACKGROUNDS if name != training]
        images, masks = (torch.cat(parts) for parts in zip(*(rendered[name] for name in others), strict=True))
        prompted = [name for name in others for _ in range(2)]
        found = leakage(images, masks, prompted, training, [style] * 14, renders=12)
        assert found.values.shape == (14,) and found.left_out == 0 and found.rows.tolist() == list(range(14))
        assert found.values.max() < 0.05, training
        images, masks = rendered[training]  # what a model draws that has learned the photos' place
        for name in others[::3]:
            found = leakage(images, masks, [name] * 2, training, [style] * 2, renders=12)
            assert found.values.min() > 0.95, (name, training)


def test_half_of_each_is_in_between():
    """The right half of snow: patches lie on 15 columns, the first 7 of them on grass alone and the last 7 on snow."""
    (grass, _), (snow, _) = (scenes(name, "photo", 1, seed=3) for name in ("grass", "snow"))
    both = torch.cat([grass[..., :32], snow[..., 32:]], -1)
    empty = torch.zeros(1, 64, 64)
    bare = leakage(both, empty, ["grass"], "snow", ["photo"]).values.item()
    assert 0.35 < bare < 0.65
    mask = empty.clone()
    mask[..., :32] = 1  # an object on the grass
    assert leakage(both, mask, ["grass"], "snow", ["photo"]).values.item() > 0.9
    assert leakage(both, mask, ["snow"], "grass", ["photo"]).values.item() < 0.1


def test_images_without_background_are_left_out_and_counted():
    images, masks = scenes("grass", "cartoon", 4)
    masks[1], masks[3] = 1, 1
    found = leakage(images, masks, ["grass"] * 4, "water", ["cartoon"] * 4, renders=8)
    assert found.rows.tolist() == [0, 2] and found.left_out == 2
    assert found.values.isfinite().all() and found.values.dtype == torch.float64
    none = leakage(images, torch.ones(4, 64, 64), ["grass"] * 4, "water", ["cartoon"] * 4, renders=2)
    assert none.values.shape == none.rows.shape == (0,) and none.left_out == 4


def test_patches_are_clear_of_objects():
    images = torch.arange(64.0).expand(1, 3, 64, 64)  # brightness is the column
    mask = torch.zeros(1, 64, 64)
    assert patches(images, mask).shape == (225, 192)
    mask[:, 5, 20] = 0.5
    mask[:, 40, 40] = 0.4
    found = patches(images, mask)
    assert len(found) == 225 - 2 * 2  # two rows of patches and two columns hold the pixel
    across = (found.amin(1) <= 20) & (found.amax(1) >= 20)
    assert across.sum() == 2 * 15 - 4  # the other patches of those columns are there


def test_an_image_depends_on_no_other():
    """Nor on their styles: blends, whose patches are nearer to one background for some and to the other for others."""
    parts = [scenes(name, style) for name, style in (("grass", "photo"), ("sand", "cartoon"))]
    images, masks = (torch.cat(part) for part in zip(*parts, strict=True))
    wood, _ = scenes("wood", "cartoon", 4, seed=1)
    blends = (images + wood) / 2
    names, styles = ["grass"] * 2 + ["sand"] * 2, ["photo"] * 2 + ["cartoon"] * 2
    whole = leakage(blends, masks, names, "wood", styles, renders=4).values
    for rows in (slice(2, 4), slice(3, 4)):
        part = leakage(blends[rows], masks[rows], names[rows], "wood", styles[rows], renders=4).values
        assert torch.equal(part, whole[rows])
        assert ((part > 0) & (part < 1)).all()
    other = leakage(blends, masks, names, "wood", ["photo"] * 4, renders=4).values
    assert torch.equal(other[:2], whole[:2]) and (other[2:] != whole[2:]).all()


def test_refuses():
    images, masks = scenes("grass", "photo")
    for arguments, message in [
        ((images, masks, ["grass"], "snow", ["photo"] * 2), "as many"),
        ((images, masks[:, None], ["grass"] * 2, "snow", ["photo"] * 2), "masks must be"),
        ((images, masks, ["lawn"] * 2, "snow", ["photo"] * 2), "no 'lawn'"),
        ((images, masks, ["grass"] * 2, "ice", ["photo"] * 2), "no 'ice'"),
        ((images, masks, ["grass"] * 2, "snow", ["oil"] * 2), "no 'oil'"),
        ((images, masks, ["grass", "snow"], "snow", ["photo"] * 2), "nothing can leak"),
        ((images * float("nan"), masks, ["grass"] * 2, "snow", ["photo"] * 2), "not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            leakage(*arguments, renders=1)
