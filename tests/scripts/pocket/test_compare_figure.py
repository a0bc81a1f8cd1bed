import pytest
import torch

from infusion.concepts.concept import Concept
from infusion.inject import cross_attention_layers
from ldm.pipeline import StableDiffusion
from scripts.pocket import compare_figure
from scripts.pocket.compare import Run
from scripts.pocket.compare_figure import main
from scripts.pocket.evaluate_masks import concept_photos


def test_the_last_file_of_a_run_is_drawn_beside_the_base_model(tmp_path, monkeypatch):
    sd = StableDiffusion.from_checkpoint("configs/backbone/pocket.yaml")
    layers = cross_attention_layers(sd.unet)
    for step, value in ((100, 0.5), (200, 0.0)):
        tensors = {name: torch.full((layer.heads * layer.dim_head,), value) for name, layer in layers.items()}
        models = Run("infusion", "zigzag_hat", 0).folder(tmp_path) / "models"
        Concept(tensors, "hat", ("a photo of a {}",), "pocket", base_hash=sd.hash).save(
            models / f"step={step:06d}.safetensors"
        )
    sheets = []
    monkeypatch.setattr(compare_figure, "captioned_grid", lambda *args, **_: sheets.append(args) or torch.ones(3, 4, 4))
    monkeypatch.setattr(compare_figure, "methods", lambda: ["infusion"])
    monkeypatch.setattr(compare_figure, "STEPS", 2)
    monkeypatch.setattr(compare_figure, "SHOWN", 3)
    main(["zigzag_hat", str(tmp_path / "figure.png"), "--work", str(tmp_path), "--device", "cpu"])
    ((rows, captions, above),) = sheets
    # nothing was learned at the last step
    torch.testing.assert_close(rows["infusion"], rows["base model"], atol=1e-4, rtol=0)
    assert len(rows["base model"]) == len(captions) == 3 and captions[0] == "a photo of a hat on grass"
    assert torch.equal(above["photos"], concept_photos("zigzag_hat")[0])
    assert (tmp_path / "figure.png").is_file()


@pytest.mark.parametrize(
    ("concept", "picture", "message"),
    [
        ("zigzag_hut", "new.png", "there is no `zigzag_hut`; did you mean `zigzag_hat`?"),
        ("zigzag_hat", "old.png", "exists already"),
        ("zigzag_hat", "new.png", "there is no such concept file"),
    ],
)
def test_mistakes_are_one_line(concept, picture, message, tmp_path, capsys):
    (tmp_path / "old.png").touch()
    with pytest.raises(SystemExit) as stop:
        main([concept, str(tmp_path / picture), "--work", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in line
