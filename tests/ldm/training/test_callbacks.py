from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.training.callbacks import Offload


def model() -> SimpleNamespace:
    return SimpleNamespace(sd=SimpleNamespace(unet=nn.Linear(2, 2), vae=nn.Linear(2, 2), text=nn.Linear(2, 2)))


@pytest.mark.parametrize("parts", [("vae",), ("vae", "text")])
def test_what_training_does_without_leaves_the_device(parts):
    module = model()
    Offload(parts, device="meta").on_train_start(SimpleNamespace(), module)
    places = {name: part.weight.device.type for name, part in vars(module.sd).items()}
    assert places == {name: "meta" if name in parts else "cpu" for name in ("unet", "vae", "text")}


def test_the_unet_has_to_stay():
    with pytest.raises(ValueError, match="not without 'unet'"):
        Offload(["vae", "unet"])
    assert torch.device(Offload().device).type == "cpu"
