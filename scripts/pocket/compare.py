"""The comparison on the pocket model: every method on the same photos, then measured by scripts/metrics.py.

    python -m scripts.pocket.compare                           # hours on two cores; a killed one goes on where it was
    python -m scripts.pocket.compare --methods infusion,lora --concepts zigzag_hat --seeds 0

Each concept's photos are masked once by CLIPSeg. Each (method, concept, seed) is one run of main.py with
`configs/compare/<method>.yaml`, whose recipe was chosen on a concept that takes no part, `TUNED_ON`. An ablation is
Infusion with other options, of the first seed.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from clipseg.weights import POCKET, load
from data.masks import segment_folder
from data.pocket.concepts import CONCEPTS, FOLDER
from infusion.methods import method_names
from ldm.util.cli import Parser, UserError, count, processes, report, suggestion, words
from ldm.util.config import ROOT, find
from ldm.util.files import copy, locked
from ldm.util.run import is_run

TUNED_ON = "green_dotted_elephant"
COMPARED = ("blue_striped_dog", "checkered_car", "zigzag_hat", "other_horse", "other_backpack")
STEPS, SCALE = 25, 5.0  # of sampling
ABLATIONS = {  # name -> overrides of configs/compare/infusion.yaml
    "own attention": ("model.params.method.params.attention=own",),
    "residual keys": ("model.params.method.params.attention=own", "model.params.method.params.keys=true"),
    "hard gate": ("model.params.gate.params.kind=hard",),
    "global gate": ("model.params.gate.params.kind=global",),
    "no mask": ("mask=none",),
    "outer layers": ("model.params.method.params.layers=^(input|output)_blocks",),
    "150 steps": ("trainer.max_steps=150",),
}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        variant: a method, or a key of `ABLATIONS`. concept: its name in the world. seed: of the training.
    """

    variant: str
    concept: str
    seed: int

    @property
    def kind(self) -> str:
        """The variant as a reader has it."""
        return self.variant.replace("_", " ")

    @property
    def label(self) -> str:
        return f"{self.kind}, {self.concept.replace('_', ' ')}, {self.seed}"

    def folder(self, work: Path) -> Path:
        return work / "runs" / self.variant.replace(" ", "-") / self.concept / f"seed-{self.seed}"

    def start(self, work: Path) -> list[str]:
        """The arguments of main.py that start it."""
        method, noun = "infusion" if self.variant in ABLATIONS else self.variant, CONCEPTS[self.concept].noun
        options = [f"superclass={noun}", f"data_root={work / 'photos' / self.concept}", f"seed={self.seed}"]
        if method in ("dreambooth", "custom_diffusion"):
            options.append(f"class_root={work / 'class' / noun}")
        return ["--base", str(find(f"configs/compare/{method}.yaml")), *options, *ABLATIONS.get(self.variant, ())]

    def train(self, work: Path) -> None:
        """Trains to the end, see `train`."""
        train(self.folder(work), self.start(work), self.label)


def methods() -> list[str]:
    """All that there are; Infusion is the first, from which reports say how the others differ."""
    return sorted(method_names(), key=lambda name: name != "infusion")


def train(folder: Path, start: Sequence[str], label: str) -> None:
    """Trains in a folder to the end, unless that is done; one that was killed goes on.

    Args:
        start: arguments of main.py that start it.

    Raises:
        UserError: main.py fails.
    """
    if (folder / "done").is_file():
        return
    with locked(folder, wait=True):  # a comparison that was killed may have left a training at work
        pass
    chosen = ["--resume", str(folder)] if is_run(folder) else ["--logdir", str(folder), *start]
    command = [sys.executable, str(ROOT / "main.py"), *chosen, "-t", "trainer.enable_progress_bar=false"]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode:
        said = found.stderr.strip().splitlines() or [f"exit status {found.returncode}"]
        raise UserError(f"{label}: {shlex.join(command)} failed: {said[-1]}")
    (folder / "done").touch()


def mask(concepts: Sequence[str], work: Path) -> None:
    """Copies of the concepts' photos with masks by the pocket CLIPSeg; those that are there are kept."""
    clipseg = None
    for name in concepts:
        folder = work / "photos" / name
        for photo in (FOLDER / name).glob("*.png"):
            if not (folder / photo.name).is_file():
                copy(photo, folder / photo.name)
        if len(list((folder / "mask").glob("*.png"))) < len(list(folder.glob("*.png"))):
            clipseg = load(POCKET) if clipseg is None else clipseg
            segment_folder(folder, CONCEPTS[name].noun, clipseg)


def measure(runs: Sequence[Run], work: Path, out: Path, samples: int, devices: int = 1) -> None:
    """Measures runs by scripts/metrics.py, or ends with its exit status.

    Args:
        samples: of each kind, for each run. devices: processes that share the work; the figures are the same.
    """
    columns = {
        "--personalized_ckpt": [str(run.folder(work)) for run in runs],
        "--labels": [run.label.replace(", ", " · ") for run in runs],
        "--groups": [run.kind for run in runs],
        "--images": [str(work / "photos" / run.concept) for run in runs],
        "--out": [str(out)],
        "--cache": [str(work / "cache")],
        "--samples": [str(samples)],
        "--devices": [str(devices)],
        "--scale": [str(SCALE)],
        "--steps": [str(STEPS)],
    }
    listed = [word for flag, values in columns.items() for word in (flag, ",".join(values))]
    status = subprocess.run([sys.executable, str(ROOT / "scripts/metrics.py"), *listed]).returncode
    if status:
        raise SystemExit(status)


def reports(runs: Sequence[Run], out: Path) -> dict[Path, list[Run]]:
    """Which runs are measured together: the methods, and the ablations beside as many trainings of Infusion."""
    methods = [run for run in runs if run.variant not in ABLATIONS]
    ablations = [run for run in runs if run.variant in ABLATIONS]
    seeds = {run.seed for run in ablations}
    beside = [run for run in methods if run.variant == "infusion" and run.seed in seeds]
    found = {out: methods, out / "ablations": [*beside, *ablations] if ablations else []}
    return {folder: own for folder, own in found.items() if own}


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--methods", metavar="M[,M]", type=words, help="None: all that there are", default=None)
    add(
        "--ablations",
        metavar="A[,A]",
        type=words,
        help=f"of {', '.join(ABLATIONS)}; none leaves them out",
        default=None,
    )
    add("--concepts", metavar="C[,C]", type=words, help="of the world", default=COMPARED)
    add("--seeds", metavar="S[,S]", type=words, help="of the trainings", default=("0", "1", "2"))
    add("--jobs", type=count, help="trainings at a time", default=2)
    add("--samples", type=count, help="of each kind, for each run", default=32)
    add("--devices", type=processes, help="processes that share the measuring, each with a device", default=1)
    add("--work", metavar="DIR", help="runs, masks and what was measured; kept", default="outputs/compare")
    about = "gets metrics.json and report.html, and ablations/ the same; None: report/ in --work"
    add("--out", metavar="DIR", help=about, default=None)
    flags = parser.parse_args(arguments)
    work = Path(flags.work)
    variants = list(methods() if flags.methods is None else flags.methods)
    variants += [] if flags.ablations == ["none"] else list(ABLATIONS if flags.ablations is None else flags.ablations)
    for name in variants:
        if name not in (*method_names(), *ABLATIONS):
            raise UserError(f"--methods: there is no `{name}`{suggestion(name, [*method_names(), *ABLATIONS])}")
    for name in flags.concepts:
        if name not in CONCEPTS:
            raise UserError(f"--concepts: there is no `{name}`{suggestion(name, list(CONCEPTS))}")
    if odd := [seed for seed in flags.seeds if not seed.isdigit()]:
        raise UserError(f"--seeds: whole numbers are wanted, not `{odd[0]}`")
    seeds = {variant: flags.seeds[:1] if variant in ABLATIONS else flags.seeds for variant in variants}
    runs = [Run(variant, name, int(seed)) for variant in variants for name in flags.concepts for seed in seeds[variant]]
    mask(flags.concepts, work)
    # the first run of a noun draws its images of the superclass, which two at a time would draw twice
    first = {run.concept: run for run in reversed(runs) if run.variant in ("dreambooth", "custom_diffusion")}
    for run in tqdm(list(first.values()), "first of each concept"):
        run.train(work)
    with ThreadPoolExecutor(flags.jobs) as pool:
        trainings = [pool.submit(run.train, work) for run in runs]
        try:
            for training in tqdm(as_completed(trainings), "training", total=len(runs)):
                training.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure, what has not begun
    for folder, own in reports(runs, Path(flags.out or work / "report")).items():
        measure(own, work, folder, flags.samples, flags.devices)


if __name__ == "__main__":
    main()
