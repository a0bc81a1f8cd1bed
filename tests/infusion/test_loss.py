import pytest
import torch

from infusion.loss import masked_loss


def test_mask_multiplies_prediction_and_target():
    torch.manual_seed(0)
    prediction, target, mask = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), torch.rand(2, 1, 3, 5)
    expected = torch.nn.functional.mse_loss(prediction * mask, target * mask)
    torch.testing.assert_close(masked_loss(prediction, target, mask), expected)
    torch.testing.assert_close(masked_loss(prediction, target), torch.nn.functional.mse_loss(prediction, target))


def test_normalised_by_the_area_of_each_mask():
    prediction, target = torch.full((2, 4, 4, 4), 3.0), torch.ones(2, 4, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, :2], mask[1, 0, 0, 0] = 1, 1  # a half and a sixteenth of the image
    assert masked_loss(prediction, target, mask).item() == pytest.approx(4 * (1 / 2 + 1 / 16) / 2)
    assert masked_loss(prediction, target, mask, normalise=True).item() == pytest.approx(4.0)


def test_an_empty_mask_gives_zero():
    assert masked_loss(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.zeros(1, 1, 2, 2), normalise=True) == 0


def test_half_precision_is_summed_in_float32():
    prediction, target = torch.full((1, 4, 8, 8), 300.0, dtype=torch.float16), torch.zeros(1, 4, 8, 8)
    assert masked_loss(prediction, target).item() == 90000.0  # beyond float16
