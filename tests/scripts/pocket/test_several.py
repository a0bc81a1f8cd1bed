import pytest
import torch

from infusion.sampling.regions import weights
from scripts.pocket.several import columns, main, together


class Brightness:
    """A CLIPSeg that finds a cat where an image is bright at its left end, and anything else where at its right."""

    def masks(self, images, prompts):
        return images[:, 0, :, :1] if "cat" in prompts[0] else images[:, 0, :, -1:]


def test_one_object_is_not_two():
    """Where all nouns claim the same places, the one that claims them most is there."""

    class Vague:
        def masks(self, images, prompts):
            return images[:, 0] * (1.0 if "cat" in prompts[0] else 0.9)

    images = torch.zeros(2, 3, 4, 4)
    images[0, :, :2] = 0.8
    found = together(Vague(), images, ["cat", "dog"])
    assert {name: figure["value"] for name, figure in found.items()} == {"1 cat": 0.5, "2 dog": 0, "all": 0}


def test_all_appear_where_each_does():
    images = torch.zeros(4, 3, 2, 2)
    images[0] = 0.9  # both
    images[1, :, 1, 0] = 0.9  # a cat
    images[2, :, :, 1] = 0.4  # nothing, by little
    found = together(Brightness(), images, ["cat", "dog"])
    assert {name: figure["value"] for name, figure in found.items()} == {"1 cat": 0.5, "2 dog": 0.25, "all": 0.25}
    assert all(figure["n"] == 4 for figure in found.values())


@pytest.mark.parametrize("count", [2, 3])
def test_columns_share_the_width(count):
    maps = weights(columns(count), count, (6, 6))
    torch.testing.assert_close(maps.sum(0), torch.ones(6, 6))
    assert maps[0, :, 0].eq(1).all() and maps[-1, :, -1].eq(1).all()


def test_a_folder_that_is_there_and_a_single_concept_are_refused(tmp_path, capsys):
    for words in (
        [str(tmp_path / "x"), "--outdir", str(tmp_path)],
        [str(tmp_path / "x"), "--outdir", str(tmp_path / "new")],
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
    there, missing = capsys.readouterr().err.splitlines()
    assert "exists already" in there and "there is no such concept file" in missing
