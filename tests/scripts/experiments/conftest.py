"""An experiment that takes seconds, and a small Ray."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from ldm.util.config import ROOT
from tests.conftest import PROTOCOL, draw_photos

NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False}
EXPERIMENT = """
subjects:
  this cat: {folder: CATS, superclass: cat}
  that dog: {folder: DOGS, superclass: dog}
variants:
  infusion: {config: [TINY, ROOT/configs/method/infusion.yaml, RECIPE]}
  dreambooth:
    config: [TINY, ROOT/configs/method/dreambooth.yaml, RECIPE]
    overrides: [data.params.prior.params.count=2, data.params.prior.params.steps=2]
seeds: [0]
measure: {config: TINY, samples: 4, steps: 2, strata: 2, resamples: 2, batch_size: 2, metrics: [lfd, w2],
          clip: pocket, clipseg: pocket, protocol: PROTOCOL}
"""
RECIPE = """
trainer: {max_steps: STEPS, precision: 32-true, accelerator: cpu, enable_progress_bar: false}
callbacks: {samples: null}
batch_size: 2
save_every: 2
"""


@pytest.fixture
def experiment(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a config, with other lines after it, that starts in an empty folder."""

    def write(more: str = "", steps: int = 4) -> Path:
        files = {"TINY": tiny, "RECIPE": tmp_path / "recipe.yaml", "PROTOCOL": tmp_path / "protocol.yaml", "ROOT": ROOT}
        files["RECIPE"].write_text(RECIPE.replace("STEPS", str(steps)))
        files["PROTOCOL"].write_text(PROTOCOL)
        text = EXPERIMENT + more
        for name in ("CATS", "DOGS"):
            files[name] = tmp_path / name.lower()
            if not files[name].exists():
                draw_photos(files[name])
        for name, path in files.items():
            text = text.replace(name, str(path))
        file = tmp_path / "small.yaml"
        file.write_text(text)
        return file

    return write


@pytest.fixture(scope="module")
def local() -> Iterator[None]:
    """Ray on one core."""
    ray.init(address="local", log_to_driver=False, logging_level="ERROR", **NODE)
    yield
    ray.shutdown()
