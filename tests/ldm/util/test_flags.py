from argparse import ArgumentTypeError

import pytest
import torch

from ldm.util.errors import UserError
from ldm.util.flags import count, find_device, number, numbers, seed


def test_values():
    assert number("-1e-3") == -0.001
    assert numbers("0.5,2") == [0.5, 2.0]
    assert count("12") == 12
    assert seed("0") == 0 and seed(str(2**63 - 1)) == 2**63 - 1
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("kind", "text"),
    [(number, "inf"), (numbers, "1,,2"), (numbers, "nan"), (count, "0"), (count, "1.5"), (seed, "-1"), (seed, 2**63)],
)
def test_what_they_refuse(kind, text):
    with pytest.raises(ArgumentTypeError, match="is not a"):
        kind(str(text))


def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="--device: warp:9 cannot be used here"):
        find_device("warp:9")
