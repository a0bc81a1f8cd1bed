"""Training at the size of Stable Diffusion 1.5, on photos of odd kinds."""

import gc
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infusion.concepts.concept import Concept
from ldm.weights.checkpoint import sha256

ROOT = Path(__file__).parents[1]
SMALL = (
    *("trainer.max_steps=2", "trainer.accumulate_grad_batches=1", "trainer.precision=32-true", "batch_size=1"),
    *(
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        "sd.params.image_size=64",
        "callbacks.samples=null",
    ),
)


@pytest.fixture
def odd_photos(tmp_path: Path) -> Path:
    """A CMYK JPEG, a 16-bit grey PNG, an upright photo stored lying, and an RGBA PNG that is its own mask."""
    folder = tmp_path / "odd"
    (folder / "mask").mkdir(parents=True)
    generator = np.random.default_rng(0)

    def noise(width: int, height: int) -> np.ndarray:
        return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)

    Image.fromarray(noise(90, 70)).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise(66, 100)[..., 0].astype(np.uint16) * 257).save(folder / "grey.png")
    lying = Image.Exif()
    lying[0x0112] = 6
    Image.fromarray(noise(100, 80)).save(folder / "lying.jpg", exif=lying)
    cut_out = Image.fromarray(noise(80, 80))
    cut_out.putalpha(Image.radial_gradient("L").resize((80, 80)).point(lambda value: 255 - value))
    cut_out.save(folder / "cut_out.png")
    for name, size in (("cmyk.png", (90, 70)), ("grey.png", (66, 100)), ("lying.png", (80, 100))):
        mask = Image.new("L", size)
        mask.paste(255, (0, 0, size[0], size[1] // 2))
        mask.save(folder / "mask" / name)
    return folder


@pytest.mark.slow
def test_two_steps_of_stable_diffusion_move_every_residual_and_leave_the_base_alone(
    random_checkpoint: Callable[[str], Path],
    odd_photos: Path,
    command: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    checkpoint, run = random_checkpoint("sd15"), tmp_path / "run"
    before = sha256(checkpoint)
    entry = ROOT / "configs" / "infusion_custom.yaml"
    where = (f"ckpt={checkpoint}", f"data_root={odd_photos}", "superclass=cat")
    command("--base", entry, "-t", "--logdir", run, *where, *SMALL)
    gc.collect()  # model and trainer hold each other, and 4 GB

    concept = Concept.load(run / "models" / "step=000002.safetensors")
    widths = sorted(tensor.numel() for tensor in concept.tensors.values())
    assert widths == [320] * 5 + [640] * 5 + [1280] * 6 and concept.numbers == 12480
    for name, residual in concept.tensors.items():
        # AdamW moves a number by about the learning rate a step, whatever the size of its gradient
        assert residual.isfinite().all() and 0.002 < residual.abs().mean() <= 0.0201, name
    assert (concept.steps, concept.architecture, concept.base_hash) == (2, "sd15", before)
    assert sha256(checkpoint) == before
    said = "4 photos of 90×70 to 80×100 pixels; the square of 66 to 80 around the subject is used at 64×64; masks ("
    assert said in caplog.text and "12,480 trainable parameters" in caplog.text
