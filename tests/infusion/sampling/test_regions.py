import pytest
import torch

from infusion.sampling.regions import Region, regions, shrink, weights


@pytest.mark.parametrize("text", ["1:0,0,1,1", "2:0.25,0,0.5,0.75", "12:0.125,0.2,0.3,0.9"])
def test_reading_undoes_writing(text):
    assert str(Region.parse(text)) == text
    assert regions(f" {text}  3:0,.5,1,1.0") == (Region.parse(text), Region(3, 0, 0.5, 1, 1))


@pytest.mark.parametrize("text", ["", "0,0,1,1", "1:0,0,1", "1:0,0,1,1,1", "1:-0.1,0,1,1", "x:0,0,1,1", "1:nan,0,1,1"])
def test_another_form_is_refused(text):
    with pytest.raises(ValueError, match="write a region as CONCEPT:x0,y0,x1,y1"):
        Region.parse(text)


@pytest.mark.parametrize("text", ["0:0,0,1,1", "1:0.5,0,0.5,1", "1:0,0.6,1,0.5", "1:0,0,1.5,1"])
def test_numbers_out_of_range_are_refused(text):
    with pytest.raises(ValueError, match="a region's"):
        Region.parse(text)


def test_coverage_is_the_share_of_each_pixel():
    assert Region(1, 0, 0, 0.5, 1).coverage((2, 4)).tolist() == [[1, 1, 0, 0]] * 2
    corner = Region(1, 0.25, 0.5, 0.625, 0.75).coverage((2, 4))  # half a row; the second pixel and half of the third
    torch.testing.assert_close(corner, torch.tensor([[0, 0, 0, 0], [0, 0.5, 0.25, 0]]))


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_coverage_adds_up_to_the_area(size):
    box = Region(1, 0.13, 0.2, 0.71, 0.9)
    assert box.coverage(size).mean().item() == pytest.approx(0.58 * 0.7)


def test_a_concept_acts_in_all_of_its_boxes_and_everywhere_without_one():
    left, right = Region(2, 0, 0, 0.5, 1), Region(2, 0.5, 0, 1, 0.5)
    maps = weights([left, right], 3, (4, 4))
    assert maps[0].eq(1).all() and maps[2].eq(1).all()
    assert maps[1].tolist() == [[1, 1, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2
    assert weights([], 3, (4, 4)) is None
    with pytest.raises(ValueError, match="2:0,0,0.5,1 is of no concept: there are 1"):
        weights([left], 1, (4, 4))


def test_layers_see_the_mean_of_each_tokens_pixels():
    maps = torch.rand(2, 4, 8)
    torch.testing.assert_close(shrink(maps, 32), maps.flatten(1))
    small = shrink(maps, 8)
    assert small.shape == (2, 8)
    torch.testing.assert_close(small[1, 3], maps[1, 0:2, 6:8].mean())
