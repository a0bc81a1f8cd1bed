"""Is the step that a training marks as its best as good as those of a full sweep? (docs/best-step.md)

    python -m scripts.pocket.best_step        # about an hour; the same command resumes it
    python -m scripts.pocket.best_step --read results/best_step.json       # the rule on earlier trials

The trainings of `configs/experiment/best_step.yaml` have `configs/with/best.yaml` and a concept file every 50 steps.
Afterwards every file is measured with twice the samples, of other seeds.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from clipseg.weights import load as load_clipseg
from data.dataset import ConceptImages
from data.prompts import TEMPLATES
from infusion.concepts.base import check_there
from infusion.metrics.run.cache import Cache
from infusion.metrics.run.evaluate import evaluate
from infusion.metrics.run.features import load_backbone
from infusion.metrics.run.options import Options, Tools
from infusion.metrics.run.protocol import Protocol
from infusion.metrics.run.subject import Subject, load_subjects
from infusion.training.best import best_trial
from ldm.pipeline import StableDiffusion
from ldm.util.cli import Parser, count, report, words
from ldm.util.config import find
from ldm.util.files import write
from scripts import experiment
from scripts.experiments.config import read_experiment
from scripts.experiments.graph import Graph, Row

CONFIG, SCALE = "configs/experiment/best_step.yaml", 5.0


def sweep(row: Row, cache: Path, sd: StableDiffusion, tools: Tools, samples: int) -> list[dict]:
    """Likeness and LFD of every concept file of a training."""
    options = Options(("lfd", "clip_i"), samples=samples, scale=SCALE, seed=5000, strata=5)
    photos = ConceptImages(row.photos.result, sd.image_size, row.subject.superclass, mask="none")
    (subject,) = load_subjects([row.path])
    found = []
    for checkpoint in tqdm(subject.checkpoints, row.label):
        one = Subject(subject.label, (checkpoint,), (photos.images + 1) / 2)
        figures = evaluate(sd, one, Protocol.of(sd.architecture), options, Cache(cache), tools)["figures"]
        like, lfd = figures["clip_i"], figures["lfd_context"]["value"]
        step = {"step": checkpoint.concept.steps, "likeness": like["value"]}
        found.append(step | {"base_likeness": like["base"]["value"], "lfd": lfd})
    return found


def judge(one: dict) -> dict[str, object]:
    """A row of the table: what the pick gains and changes, beside the step that gains most and the last, by sweep."""
    swept = {trial["step"]: trial for trial in one["sweep"]}
    pick = swept[best_trial(one["trials"])["step"]]
    most, last = max(swept.values(), key=lambda trial: trial["likeness"]), one["sweep"][-1]
    return {
        "method, concept": f"{one['method']}, {one['concept'].replace('_', ' ')}",
        "pick": pick["step"],
        "gains most": most["step"],
        **{f"gain of {name}": trial["likeness"] - trial["base_likeness"]
           for name, trial in (("the pick", pick), ("the most", most), ("the last", last))},
        "LFD of the pick": pick["lfd"],
        "of the last": last["lfd"],
    }  # fmt: skip


def table(results: Sequence[dict]) -> str:
    """The rows in Markdown, and their means."""
    frame = pd.DataFrame([judge(one) for one in results])
    mean = frame.mean(numeric_only=True).to_frame().T.assign(**{frame.columns[0]: "mean"})
    frame = pd.concat([frame, mean])
    forms = ["{}", "{:.0f}", "{:.0f}", "{:.3f}", "{:.3f}", "{:.3f}", "{:.4f}", "{:.4f}"]
    lines = [list(frame.columns), ["---"] * len(forms)]
    lines += [[form.format(cell) for form, cell in zip(forms, row, strict=True)] for row in frame.values.tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--read", metavar="FILE", help="figures measured before, in place of training")
    add("--only", metavar="N[,N]", type=words, help="methods and concepts; None: all that are trained", default=())
    add("--samples", type=count, help="for each concept file", default=32)
    add("--work", metavar="DIR", help="trainings and what was measured; kept", default="outputs/best_step")
    add("--out", metavar="FILE", help="gets the figures", default="outputs/best_step.json")
    flags = parser.parse_args(arguments)
    if flags.read:
        check_there("read", flags.read, "file")
        print(table(json.loads(find(flags.read).read_text())))
        return
    work, results = Path(flags.work), []
    only = ["--only", ",".join(flags.only)] if flags.only else []
    experiment.main([CONFIG, "--out", flags.work, *only])
    rows = Graph(read_experiment(CONFIG, [], work).only(flags.only), work).rows
    sd = StableDiffusion.from_checkpoint(find("configs/backbone/pocket.yaml"))
    tools = Tools(clip=load_backbone("pocket"), clipseg=load_clipseg("pocket"), mask_prompts=TEMPLATES)
    for row in rows:
        trials = json.loads((Path(row.path) / "models" / "best.json").read_text())["trials"]
        swept = sweep(row, work / "cache", sd, tools, flags.samples)
        results.append({"method": row.variant.name, "concept": row.subject.name, "trials": trials, "sweep": swept})
        write(Path(flags.out), (json.dumps(results, indent=1) + "\n").encode())
    print(table(results))


if __name__ == "__main__":
    main()
