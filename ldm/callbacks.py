"""What training writes beside its resume state."""

from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from safetensors.torch import save_file
from torchvision.utils import make_grid, save_image

from ldm.files import replacing


class ExportWeights(pl.Callback):
    """Writes the module's `weights()` to `<run>/models/weights.safetensors` when training ends, in float16.

    Listed behind a weight-averaging callback it writes the averaged weights.
    """

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        path = Path(trainer.default_root_dir) / "models" / "weights.safetensors"
        half = {name: t.half() if t.is_floating_point() else t for name, t in module.weights().items()}
        with replacing(path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in half.items()}, partial)


class Reconstructions(pl.Callback):
    """Every `every` steps, images above their reconstructions, in `<run>/images/`."""

    def __init__(self, every: int = 500):
        self.every = every

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch: dict, index: int
    ) -> None:
        if trainer.global_step % self.every:
            return
        images = batch["images"][:8]
        with torch.no_grad():
            decoded = module.vae.decode(module.vae.encode(images)).float().clamp(-1, 1)
        folder = Path(trainer.default_root_dir) / "images"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(
            make_grid(torch.cat([images, decoded]) / 2 + 0.5, len(images)),
            folder / f"step={trainer.global_step:06d}.png",
        )


class Samples(pl.Callback):
    """Every `every` steps, a grid of samples in `<run>/images/`: a column per prompt, `rows` seeds, always the same.

    The module's current weights are sampled, not averaged ones.
    """

    def __init__(self, prompts: list[str], every: int = 1000, rows: int = 2, steps: int = 25, scale: float = 5.0):
        self.prompts, self.every, self.rows, self.steps, self.scale = prompts, every, rows, steps, scale

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch: dict, index: int
    ) -> None:
        if trainer.global_step % self.every or trainer.global_step == 0:
            return
        images = module.sd.sample(self.prompts * self.rows, steps=self.steps, scale=self.scale)
        folder = Path(trainer.default_root_dir) / "images"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(make_grid(images, len(self.prompts)), folder / f"step={trainer.global_step:06d}.png")
