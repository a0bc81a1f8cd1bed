"""A backbone that runs in milliseconds, and photos for it."""

import ctypes
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.pipeline import StableDiffusion
from ldm.util.digests import FOLDER
from ldm.weights.checkpoint import PREFIXES, save

TINY = """
sd:
  target: ldm.pipeline.StableDiffusion
  params:
    name: tiny
    image_size: 16
    checkpoint: ${ckpt}
    unet:
      target: ldm.models.unet.UNet
      params: {model_channels: 32, channel_mult: [1, 2], num_res_blocks: 1, attention_resolutions: [2], num_heads: 2,
               context_dim: 24}
    vae:
      target: ldm.models.autoencoder.AutoencoderKL
      params: {ch: 32, ch_mult: [1, 2], num_res_blocks: 1}
    text:
      target: ldm.models.text.ClipText
      params:
        tokenizer: {target: ldm.models.tokenizer.Tokenizer, params: {context_length: 16}}
        hidden_size: 24
        intermediate_size: 48
        layers: 1
        heads: 2
        max_length: 16
    schedule: {target: ldm.diffusion.schedule.Schedule}
ckpt: CKPT
ckpt_source: the shelf
"""
PROTOCOL = """
concept: ["a photo of a {} on grass", "a cartoon of a {} on snow"]
none: [grass]
superclass: ["a photo of a {superclass}"]
neighbours: ["a photo of a {neighbour}"]
others: [owl]
"""


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test, nor a process that it starts, uses the user's own cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone file beside its weights, none of which is zero."""
    folder = tmp_path_factory.mktemp("backbone")
    path = folder / "tiny.yaml"
    path.write_text(TINY.replace("CKPT", str(folder / "tiny.safetensors")))
    torch.manual_seed(0)
    sd = StableDiffusion.from_config(path)
    with torch.no_grad():
        for parameter in sd.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    save(folder / "tiny.safetensors", dict(sd.named_children()), sd.architecture, torch.float32)
    return path


@pytest.fixture(scope="session")
def configs() -> Path:
    """The published backbones' configs."""
    return Path(__file__).parents[1] / "configs" / "backbone"


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory, configs: Path) -> Iterator[Callable[[str], Path]]:
    """Name of a backbone -> a float16 checkpoint of its full size, random such that activations keep their scale."""
    folder = tmp_path_factory.mktemp("full-size")

    def checkpoint(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            with torch.device("meta"):
                sd = StableDiffusion.from_config(configs / f"{name}.yaml")
            generator = torch.Generator().manual_seed(0)
            save_file(
                {
                    prefix + key: random_values(key, tensor.shape, generator)
                    for component, prefix in PREFIXES.items()
                    for key, tensor in getattr(sd, component).state_dict().items()
                },
                path,
            )
        return path

    yield checkpoint
    shutil.rmtree(folder)  # gigabytes


def random_values(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Of unit gain for matrices and kernels, about 1 for the weights of norms, small for anything else."""
    values = torch.randn(shape, generator=generator)
    if "embedding" in name:
        values *= 0.1
    elif len(shape) >= 2:
        values /= math.sqrt(math.prod(shape[1:]))
    else:
        values = values * 0.1 + name.endswith("weight")
    return values.half()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return draw_photos(tmp_path / "photos")


def draw_photos(folder: Path) -> Path:
    """Three photos of 24 × 20 pixels with masks of their left halves."""
    (folder / "mask").mkdir(parents=True)
    mask = np.zeros((20, 24), np.uint8)
    mask[:, :12] = 200
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        Image.fromarray(mask).save(folder / "mask" / f"{i}.png")
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`python main.py …`, in this process."""

    import main  # not above: it brings in Lightning's Trainer, and few tests run it

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
        main.main()

    return run


def heed_permissions(heed: bool = True) -> None:
    """Whether the permissions of files count for root, too (capset(2): CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    if os.geteuid():
        return
    libc, header, sets = (
        ctypes.CDLL(None, use_errno=True),
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        (ctypes.c_uint32 * 6)(),
    )
    assert libc.capget(header, sets) == 0
    sets[0] = sets[0] & ~0b110 if heed else sets[0] | 0b110
    assert libc.capset(header, sets) == 0


@pytest.fixture
def as_nobody() -> Callable[[], AbstractContextManager[None]]:
    """A `with` in which the permissions of files count, also for tests that run as root."""

    @contextmanager
    def nobody() -> Iterator[None]:
        heed_permissions()
        try:
            yield
        finally:
            heed_permissions(False)

    return nobody


@pytest.fixture
def shelf() -> Iterator[Path]:
    """A folder that may be read and not be written to."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are for one user alone
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)
