import json

import pytest
import torch

from clipseg.model import ClipSeg
from clipseg.weights import POCKET_WEIGHTS, load
from data.pocket.concepts import CONCEPTS, draw
from data.pocket.world import World
from ldm.util.config import find
from scripts.pocket import evaluate_masks
from scripts.pocket.evaluate_masks import concept_photos, evaluate, iou, told_apart


def test_iou_of_shifted_squares():
    true = torch.zeros(8, 8)
    true[:4, :4] = 1
    assert iou(true * 0.3, true) == 1  # the maximum is divided by
    assert iou(true.roll(2, 1), true) == pytest.approx(8 / 24)
    assert iou(true.roll(4, 0), true) == 0
    assert iou(torch.zeros(8, 8), torch.zeros(8, 8)) == 1
    assert iou(torch.ones(8, 8), true) == 16 / 64


def test_photos_come_with_their_true_masks():
    photos, masks = concept_photos("zigzag_hat")
    images, true = draw(CONCEPTS["zigzag_hat"], World(), list(CONCEPTS).index("zigzag_hat"))
    assert (photos - images).abs().max() < 0.003 and (masks - true[:, 0]).abs().max() < 0.003


class Perfect(ClipSeg):
    """Knows the answers: masks by the true ones, fainter where the noun is another."""

    def __init__(self, share: float):
        torch.nn.Module.__init__(self)
        self.share = share

    def masks(self, images, prompts):
        for name, concept in CONCEPTS.items():
            photos, true = concept_photos(name)
            if torch.equal(photos, images):
                right = all(concept.noun in prompt for prompt in prompts)
                true = true.clone()
                true[:, :, int(64 * self.share) :] = 0
                return true * (0.8 if right else 0.1)
        raise AssertionError("images of no concept")


def test_figures_of_right_and_of_cut_masks():
    figures, rows = evaluate(Perfect(1.0))
    assert figures["mean_iou"] == 1 and figures["lowest"] == 1 and figures["n"] == 45
    assert figures["concepts"] == dict.fromkeys(CONCEPTS, 1.0)
    assert figures["present"] == pytest.approx(0.8, abs=0.01) and figures["absent"] == pytest.approx(0.1, abs=0.01)
    assert rows.shape == (90, 3, 64, 64)
    cut = evaluate(Perfect(0.5))[0]
    assert 0.2 < cut["mean_iou"] < 0.8 and cut["lowest"] < 0.2


def test_command_prints_json_and_writes_a_sheet(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluate_masks, "load", lambda *paths, **options: Perfect(1.0))
    monkeypatch.setattr(evaluate_masks, "told_apart", lambda clipseg: {"value": 1.0, "stderr": 0.0, "n": 1})
    evaluate_masks.main(["--sheet", str(tmp_path / "sheet.png")])
    assert json.loads(capsys.readouterr().out)["mean_iou"] == 1
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def test_shipped_weights_find_the_concepts_and_tell_nouns_apart():
    """At least 0.85 on objects that CLIPSeg was not trained on."""
    clipseg = load("pocket")
    figures, _ = evaluate(clipseg)
    assert figures["mean_iou"] >= 0.85 and min(figures["concepts"].values()) > 0.5
    assert told_apart(clipseg)["value"] > 0.7
    assert find(POCKET_WEIGHTS).stat().st_size <= 2_000_000
