import numpy as np
import pytest
import torch
from PIL import Image

from data.crop import MIDDLE, around, share_inside, to_square


def mask(height: int, width: int, top: int, left: int, bottom: int, right: int) -> Image.Image:
    values = np.zeros((height, width), np.float32)
    values[top:bottom, left:right] = 0.5
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("box", "place", "inside"),
    [  # of a photo of 20 × 60, whose square can go down by 40
        ((0, 0, 20, 20), (0.5, 0.0), 1.0),
        ((25, 0, 35, 20), (0.5, 0.5), 1.0),
        ((16, 5, 20, 10), (0.5, 0.2), 1.0),  # its centre is at 18, the square's at 10 + 8
        ((55, 0, 60, 20), (0.5, 1.0), 1.0),
        ((0, 0, 60, 20), (0.5, 0.5), 1 / 3),
        ((0, 0, 40, 20), (0.5, 0.25), 0.5),
    ],
)
def test_the_square_lies_around_the_masks_mass(box, place, inside):
    tall = mask(60, 20, box[0], box[1], box[2], box[3])
    assert around(tall) == pytest.approx(place) and share_inside(tall, around(tall)) == pytest.approx(inside)
    wide = tall.transpose(Image.Transpose.TRANSPOSE)
    assert around(wide) == pytest.approx(place[::-1]) and share_inside(wide, around(wide)) == pytest.approx(inside)


def test_a_square_photo_is_taken_whole():
    assert around(mask(20, 20, 0, 0, 3, 3)) == MIDDLE and share_inside(mask(20, 20, 0, 0, 3, 3), MIDDLE) == 1


def test_a_part_of_a_pixel_counts_in_part():
    assert share_inside(mask(3, 2, 0, 0, 1, 2), (0.5, 0.5)) == pytest.approx(0.5)  # the square begins within row 0


def test_photo_and_mask_of_another_resolution_have_the_same_square():
    photo = np.zeros((60, 20, 3), np.uint8)
    photo[12:24, 4:16] = 255
    small = mask(30, 10, 6, 2, 12, 8)
    place = around(small)
    assert place == around(mask(60, 20, 12, 4, 24, 16))
    shown = to_square(Image.fromarray(photo), 20, place)[0] / 255
    torch.testing.assert_close(shown, to_square(small, 20, place)[0] * 2, atol=0.45, rtol=0)
    assert shown[4:16, 4:16].eq(1).all() and shown.sum() == 144
