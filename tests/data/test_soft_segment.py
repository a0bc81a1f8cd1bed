import numpy as np
import pytest
import torch
from PIL import Image

from data import soft_segment


class Half:
    """Masks the left half of whatever it sees."""

    def to(self, device):
        return self

    def squeeze(self, images):
        return images

    def masks(self, images, prompts):
        self.prompts = list(prompts)
        left = torch.zeros(len(images), *images.shape[2:])
        left[..., : images.shape[3] // 2] = 1
        return left


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.png"):
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


def test_the_command_writes_masks_and_a_table(folder, monkeypatch, capsys):
    asked, model = [], Half()
    monkeypatch.setattr("clipseg.weights.load", lambda *paths: asked.append(paths) or model)
    soft_segment.main(["--image_dir", str(folder), "--super_class", "apple", "--templates", "one {}", "two {}"])
    assert asked == [("ckpt/clipseg-rd64-refined", None, None)] and model.prompts == ["one apple", "two apple"]
    out = capsys.readouterr().out
    assert ["a.jpg", "50.0%", "1.00"] in [line.split() for line in out.splitlines()] and "2 masks written" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image_dir", "nowhere"], "there is no folder nowhere"),
        (["--model_weight", "nowhere"], "there is no nowhere; copy the files of `CIDAS/clipseg-rd64-refined`"),
        (["--super_class", ""], "super_class: is empty"),
        (["--device", "tpu9"], "--device: tpu9"),
        (["--batch_size", "0"], "--batch_size"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        soft_segment.main(["--image_dir", str(folder), "--super_class", "apple", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (folder / "mask").exists()
