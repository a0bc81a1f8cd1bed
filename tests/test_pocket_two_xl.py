"""Pocket two with SDXL's structure, from nothing: its text encoders learn to read, its UNet to draw, and it samples."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from data.pocket_two.batches import table_of
from data.pocket_two.world import draw_scene
from ldm.pipeline import StableDiffusion
from ldm.weights.checkpoint import write

BRIEF = (
    "trainer.max_steps=2",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "data.params.batch_size=2",
)


def test_train_export_load_and_sample(command, configs: Path, tmp_path: Path):
    backbone, recipes = configs / "pocket_two_xl.yaml", configs.parent / "pocket_two"
    torch.manual_seed(0)
    start = StableDiffusion.from_config(backbone)
    write(tmp_path / "vae.safetensors", start.vae.state_dict(), {})
    command("--base", recipes / "xl_text.yaml", "-t", "--logdir", tmp_path / "text", *BRIEF)
    text = tmp_path / "text/models/weights.safetensors"

    rng = np.random.default_rng(0)
    shard = {"latents": torch.randn(4, 12, 16, 16).half(), "halves": torch.randn(4, 12, 8, 8).half()}
    shard |= {"objects": torch.zeros(4, 1, 16, 16).byte(), "table": table_of([draw_scene(rng) for _ in range(4)])}
    fingerprint = str(sum(parameter.detach().double().abs().sum().item() for parameter in start.vae.parameters()))
    write(tmp_path / "latents/00000.safetensors", shard, {"fingerprint": fingerprint})
    given = [f"parts.vae={tmp_path / 'vae.safetensors'}", f"parts.text={text}", "data.params.count=10000"]
    given += [f"data.params.cache={tmp_path / 'latents'}", "model.params.compile=false"]
    given += ["callbacks.average=null", "callbacks.samples=null"]
    given.append("trainer.max_steps=4")  # the last layers of UNet and transformers are zero at first
    command("--base", recipes / "xl.yaml", "-t", "--logdir", tmp_path / "xl", *BRIEF, *given)

    sd = StableDiffusion.from_checkpoint(backbone, tmp_path / "xl/models/weights.safetensors")
    read = load_file(text)
    assert any((tensor != read[name].float()).any() for name, tensor in sd.text.state_dict().items())  # trained on
    assert all(torch.equal(tensor, start.vae.state_dict()[name].half().float())
               for name, tensor in sd.vae.state_dict().items())  # fmt: skip
    assert sd.unet.out[2].weight.any()  # a fresh one is zero there
    images = sd.sample(["a photo of a cat"], steps=2)
    assert images.shape == (1, 3, 64, 64) and images.isfinite().all()
