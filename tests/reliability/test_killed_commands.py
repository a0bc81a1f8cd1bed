"""Masks and measurements that are killed and started again give the bytes of those that are not."""

import random
import shutil
from pathlib import Path

import pytest

from tests.conftest import PROTOCOL
from tests.reliability.runs import contents

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "data/pocket/concepts/zigzag_hat"


def kill_and_finish(launch, words: list[object], places: list[dict[str, object]]) -> None:
    """Starts a command, kills it at each of the places, and lets it end."""
    module, *arguments = words
    for place in places:
        ended = launch(module, *arguments, **place)
        assert ended.status in (0, -9), ended.said
    ended = launch(module, *arguments)
    assert ended.status == 0, ended.said


MOMENTS = [{"kill_after": random.Random(seed).uniform(0.2, 3)} for seed in range(2)]
PLACES = pytest.mark.parametrize("places", [[{"killed_at": 4}, {"killed_at": 5}], MOMENTS], ids=["writing", "any"])


@pytest.fixture(scope="module")
def masked(launch, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("masked")
    kill_and_finish(launch, segment(folder), [])
    found = contents(folder)
    assert len([name for name in found if name.startswith("mask")]) == 10  # a mask and its overlay for each
    return found


def segment(folder: Path) -> list[object]:
    for photo in PHOTOS.glob("*.png"):
        shutil.copyfile(photo, folder / photo.name)
    return ["data.soft_segment", "--image_dir", folder, "--super_class", "hat", "--model_weight", "pocket"]


@PLACES
def test_masks(launch, masked, tmp_path, places):
    kill_and_finish(launch, segment(tmp_path), places)
    assert contents(tmp_path) == masked


def measuring(tiny: Path, run: Path, out: Path) -> list[object]:
    protocol = out.parent / "protocol.yaml"
    protocol.write_text(PROTOCOL)
    flags = ["--config", tiny, "--personalized_ckpt", run, "--protocol", protocol, "--out", out, "--device", "cpu"]
    flags += ["--samples", "6", "--steps", "1", "--strata", "1", "--resamples", "2", "--batch_size", "2"]
    return ["scripts.metrics", *flags, "--metrics", "lfd,w2,drift", "--clip", "pocket", "--clipseg", "pocket"]


def figures(out: Path) -> dict[str, bytes]:
    """What was measured, wherever that was; the page says when, too."""
    own = str(out.parent).encode()
    return {name: data.replace(own, b"") for name, data in contents(out).items() if not name.endswith(".html")}


@pytest.fixture(scope="module")
def measured(launch, tiny, whole, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("measured") / "out"
    kill_and_finish(launch, measuring(tiny, whole[0], out), [])
    return figures(out)


@PLACES
def test_measurements(launch, tiny, whole, measured, tmp_path, places):
    kill_and_finish(launch, measuring(tiny, whole[0], tmp_path / "out"), places)
    assert figures(tmp_path / "out") == measured
