import json

import pytest
import torch
from safetensors.torch import save_file

from ldm.util.config import find, instantiate, load_config
from scripts.pocket_two import masks
from scripts.pocket_two.masks import CONFIG, iou, main


def test_iou_of_shifted_squares():
    true = torch.zeros(2, 8, 8)
    true[:, :4, :4] = 1
    found = torch.stack([0.3 * true[0], true[0].roll(2, 1)])  # the maximum is divided by
    assert iou(found, true).tolist() == pytest.approx([1, 8 / 24])


def test_the_command_prints_a_figure_for_every_concept_and_writes_a_sheet(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(masks, "SCENES", 1)
    torch.manual_seed(0)
    clipseg = instantiate(load_config([find(CONFIG)]).clipseg, "clipseg")
    save_file(clipseg.network.state_dict(), tmp_path / "network.safetensors")
    config = tmp_path / "clipseg.yaml"
    config.write_text(f"include: {find(CONFIG).resolve()}\nclip: null\n")  # all of it is in one file
    files = ["--model_weight", str(tmp_path / "network.safetensors"), "--sheet", str(tmp_path / "sheet.png")]
    main(["--config", str(config), *files])
    said = json.loads(capsys.readouterr().out)
    assert len(said["concepts"]) == 16 and said["worst"] == min(said["concepts"].values())
    assert 0 <= said["mean"] <= 1 and said["own"] in (0.0, 0.5, 1.0)
    assert (tmp_path / "sheet.png").is_file()
