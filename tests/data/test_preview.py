import numpy as np
import pytest
import torch

from data.dataset import ConceptImages
from data.images import read_image
from data.latents import ConceptData
from data.preview import overlay, sheet
from tests.data.conftest import attached


def test_the_edges_of_the_square_are_shown_where_it_is_not_the_whole_photo():
    image, mask = torch.zeros(3, 60, 20), torch.ones(60, 20)
    lines = (overlay(image, mask, (0.5, 0.5)) == 1).all(0).all(1).nonzero().flatten().tolist()
    assert lines == [20, 39]
    assert (overlay(image, mask, (0.5, 0.0)) == 1).all(0).all(1).nonzero().flatten().tolist() == [19]
    whole = torch.zeros(3, 20, 20), torch.ones(20, 20)
    assert torch.equal(overlay(whole[0], whole[1], (0.5, 0.5)), overlay(whole[0], whole[1]))


def test_a_sheet_shows_photos_as_they_are_trained():
    photo, half = torch.ones(3, 8, 8), torch.full((1, 8, 8), 0.5)
    grid = sheet([(photo, None), (photo, half * 0), (photo, half)])
    tiles = [grid[:, 2:10, 2 + 10 * i : 10 + 10 * i] for i in range(3)]
    assert tiles[0].eq(1).all() and tiles[1].allclose(torch.tensor(0.35))
    within = torch.tensor([0.7 + 0.3, 0.7 + 0.3 * 0.25, 0.7 + 0.3 * 0.1]).view(3, 1, 1).expand(3, 8, 8)
    torch.testing.assert_close(tiles[2], (within + 0.35) / 2)  # what is half learned is not shown as learned


def test_a_training_writes_it(photos, vae, tmp_path):
    data = attached(ConceptData(ConceptImages(photos, 16, "cat")), vae, run=tmp_path / "run")
    shown = read_image(tmp_path / "run/photos.png")
    assert shown.size == (3 * 18 + 2, 18 + 2)
    expected = sheet(data.images)
    pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1) / 255
    assert pixels.sub(expected).abs().max().item() == pytest.approx(0, abs=1 / 255)
