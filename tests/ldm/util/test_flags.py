from argparse import ArgumentParser, ArgumentTypeError

import pytest
import torch

from ldm.util.errors import UserError
from ldm.util.flags import add_base_flags, components, count, find_device, number, numbers, seed


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


def test_components_of_a_base_model():
    parser = ArgumentParser()
    add_base_flags(parser)
    assert components("unet=a=b.pt, vae=c.pt") == {"unet": "a=b.pt", "vae": "c.pt"}
    flags = parser.parse_args(["--part", "unet=a.pt", "--part", "vae=b.pt,unet=c.pt", "--use_ema"])
    assert flags.part == {"unet": "c.pt", "vae": "b.pt"} and flags.use_ema is True
    flags = parser.parse_args([])
    assert flags.part is None and flags.use_ema is None and flags.ckpt is None
    parser.set_defaults(part="text=d.pt")  # as a picture says it
    assert parser.parse_args([]).part == {"text": "d.pt"}
    assert parser.parse_args(["--part", "vae=b.pt", "--no-use_ema"]).part == {"vae": "b.pt"}
    for text, message in {"vae": "such as unet=FILE", "vea=x": "did you mean `vae`", "vae=": "such as"}.items():
        with pytest.raises(ArgumentTypeError, match=message):
            components(text)


def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match="--device: warp:9 cannot be used here"):
        find_device("warp:9")
