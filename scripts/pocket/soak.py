"""Many concepts trained and sampled one after the other in one process: whether they leave anything behind.

    python -m scripts.pocket.soak                 # 200 concepts on one model

Concepts of the world and methods take turns; each is trained for a few steps with all that main.py writes, taken off
the model, read from its file and sampled. Then the process's resident memory, open files and threads are counted.
"""

import gc
import json
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from tqdm import tqdm

from data.dataset import ConceptImages
from data.latents import ConceptData
from data.pocket.concepts import CONCEPTS, FOLDER
from data.prompts import TEMPLATES
from infusion.concepts.concept import Concept
from infusion.deltas import detach
from infusion.inject import remove
from infusion.methods import find_method, method_names
from infusion.training.trainer import ConceptTrainer, SaveConcept
from ldm.pipeline import StableDiffusion
from ldm.util.cli import Parser, count, report
from ldm.util.config import find
from ldm.util.files import write
from ldm.util.run import Finite, Log, ResumeState, StateFile
from scripts.benchmarks.memory import status

STEPS = 4  # of a training
HANDLES = Path("/proc/self/fd")


@dataclass(frozen=True)
class Left:
    """What the process holds after so many concepts.

    Attributes:
        number: of the concept, from 0. method: of its training. memory: resident, in bytes. handles: open files.
        threads: of the process.
    """

    number: int
    method: str
    memory: int
    handles: int
    threads: int


def one(sd: StableDiffusion, name: str, method: str, seed: int, folder: Path) -> None:
    """Trains a concept into a run folder, takes it off the model and draws it from its file."""
    noun = CONCEPTS[name].noun
    module = ConceptTrainer(sd, find_method(method)(), noun, TEMPLATES, seed=seed)
    data = ConceptData(ConceptImages(FOLDER / name, sd.image_size, noun), batch_size=2, seed=seed)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        default_root_dir=folder,
        logger=Log(folder, name="", version="tensorboard"),
        callbacks=[SaveConcept(STEPS), Finite(), ResumeState(2, keep=2)],
        plugins=[StateFile()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    remove(sd.unet)
    detach(sd.unet)
    concept = Concept.load(folder / f"models/step={STEPS:06d}.safetensors")
    sd.sample(["a photo of a {}"], concepts=[concept], steps=2, seed=seed)


def soak(sd: StableDiffusion, total: int) -> list[Left]:
    """What is left after each of so many concepts (Linux)."""
    methods, concepts, found = method_names(), list(CONCEPTS), []
    for number in tqdm(range(total), "concepts"):
        method = methods[number % len(methods)]
        folder = Path(tempfile.mkdtemp())
        one(sd, concepts[number % len(concepts)], method, number, folder)
        shutil.rmtree(folder)
        gc.collect()
        handles = len(list(HANDLES.iterdir()))
        threads = len(list(Path("/proc/self/task").iterdir()))
        found.append(Left(number, method, status("VmRSS"), handles, threads))
    return found


def growth(found: Sequence[Left], name: str) -> float:
    """By how much a figure grows with each concept: the slope of a line through its last three quarters."""
    kept = found[len(found) // 4 :]
    return float(np.polyfit([left.number for left in kept], [getattr(left, name) for left in kept], 1)[0])


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=count, help="how many", default=200)
    parser.add_argument("--out", metavar="FILE", help="gets the figures", default="results/soak.json")
    flags = parser.parse_args(arguments)
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    started = time.monotonic()
    found = soak(StableDiffusion.from_checkpoint(find("configs/backbone/pocket.yaml")), flags.concepts)
    slopes = {name: growth(found, name) for name in ("memory", "handles", "threads")}
    said = {
        "seconds": round(time.monotonic() - started),
        "growth": slopes,
        "concepts": [asdict(left) for left in found],
    }
    write(Path(flags.out), (json.dumps(said, indent=1) + "\n").encode())
    first, last = found[len(found) // 4], found[-1]
    print(f"memory {first.memory / 1e6:.0f} -> {last.memory / 1e6:.0f} MB, {slopes['memory'] / 1e3:+.1f} kB a concept")
    print(f"handles {first.handles} -> {last.handles}, threads {first.threads} -> {last.threads}")


if __name__ == "__main__":
    main()
