"""Is the step that a training marks as its best as good as the best of a full sweep? (docs/best-step.md)

    python -m scripts.pocket.best_step        # about an hour; the same command resumes it

The trainings of `configs/experiment/best_step.yaml` have `configs/with/best.yaml` and a concept file every 50 steps.
Afterwards every file is measured with twice the samples, of other seeds, and the pick is compared with the best of
these. That best is a maximum of estimates, so it is somewhat too good, and the comparison is hard on the pick.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from torch import Tensor
from tqdm import tqdm

from data.dataset import ConceptImages
from data.prompts import TEMPLATES
from infusion.metrics.measures.balance import Balance, Trial, balance
from infusion.metrics.measures.estimate import bootstrap
from infusion.metrics.run.cache import Cache
from infusion.metrics.run.options import Options, Tools
from infusion.metrics.run.protocol import CONTEXT, Protocol
from infusion.metrics.run.stages import Stages
from infusion.metrics.run.subject import load_subjects
from infusion.training.best import Networks, exhausted
from ldm.pipeline import StableDiffusion
from ldm.util.cli import Parser, count, report, words
from ldm.util.config import find
from ldm.util.files import write
from scripts import experiment
from scripts.experiments.config import read_experiment
from scripts.experiments.graph import Graph, Row

CONFIG, SCALE, PATIENCE = "configs/experiment/best_step.yaml", 5.0, 2


def sweep(row: Row, cache: Path, sd: StableDiffusion, tools: Networks, samples: int) -> list[Trial]:
    """Every concept file of a training, measured."""
    options = Options(("lfd", "w2", "clip_i"), samples=samples, scale=SCALE, seed=5000)
    noun = row.subject.superclass
    photos = (ConceptImages(row.photos.result, sd.image_size, noun, mask="none").images + 1) / 2
    prompts = tuple(Protocol.of(sd.architecture).prompts(CONTEXT, noun))
    weighed = Balance(Stages(sd, options, tools, Cache(cache)), prompts, noun, photos)
    (subject,) = load_subjects([row.path])
    return [weighed.measure(checkpoint) for checkpoint in tqdm(subject.checkpoints, row.label)]


def compare(pick: Trial, best: Trial) -> dict[str, float]:
    """How much lower the pick's balance is than the best's: `value`, and its 95 % interval, over common samples."""

    def lower(picked: Tensor, other: Tensor) -> float:
        return balance(other, best.ceiling) - balance(picked, pick.ceiling)

    low, high = bootstrap(lower, pick.rows, best.rows, paired=True)
    return {"value": best.balance - pick.balance, "low": low, "high": high}


def stops_at(trials: Sequence[dict]) -> int:
    """The step at which a training with `early_stop` = `PATIENCE` would have ended."""
    balances = [trial["balance"] for trial in trials]
    ends = (i for i in range(len(trials)) if exhausted(balances[: i + 1], PATIENCE))
    return trials[next(ends, -1)]["step"]


def result(method: str, concept: str, folder: Path, swept: Sequence[Trial]) -> dict:
    """What one training says."""
    said = json.loads((folder / "models" / "best.json").read_text())
    best = max(swept, key=lambda trial: trial.balance)
    pick = next(trial for trial in swept if trial.step == said["best"])
    stop = stops_at(said["trials"])
    stopped = max((trial for trial in said["trials"] if trial["step"] <= stop), key=lambda trial: trial["balance"])
    return {
        "method": method,
        "concept": concept,
        "pick": pick.as_dict(),
        "best": best.as_dict(),
        "last": swept[-1].as_dict(),
        "lower": compare(pick, best),
        "early_stop": {"stops_at": stop, "pick": stopped["step"]},
        "trials": said["trials"],
        "sweep": [trial.as_dict() for trial in swept],
    }


def table(results: Sequence[dict]) -> str:
    """The results in Markdown."""
    heads = ("method, concept", "pick", "sweep's best", "balance of the pick", "of the best", "lower by", "of the last")
    lines = [f"| {' | '.join((*heads, 'early_stop ends at'))} |", "|---" * (len(heads) + 1) + "|"]
    for one in results:
        pick, best, last, lower = one["pick"], one["best"], one["last"], one["lower"]
        lines.append(
            f"| {one['method']}, {one['concept'].replace('_', ' ')} | {pick['step']} | {best['step']} "
            f"| {pick['balance']:.2f} | {best['balance']:.2f} "
            f"| {lower['value']:.2f} ({lower['low']:.2f} … {lower['high']:.2f}) | {last['balance']:.2f} "
            f"| {one['early_stop']['stops_at']} |"
        )
    means = [fmean(one[which]["balance"] for one in results) for which in ("pick", "best", "last")]
    lower = fmean(one["lower"]["value"] for one in results)
    lines.append(f"| mean | | | {means[0]:.2f} | {means[1]:.2f} | {lower:.2f} | {means[2]:.2f} | |")
    return "\n".join(lines)


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", metavar="N[,N]", type=words, help="methods and concepts; None: all that are trained", default=())
    add("--samples", type=count, help="for each concept file", default=32)
    add("--work", metavar="DIR", help="trainings and what was measured; kept", default="outputs/best_step")
    add("--out", metavar="FILE", help="gets the figures", default="results/best_step.json")
    flags = parser.parse_args(arguments)
    work = Path(flags.work)
    only = ["--only", ",".join(flags.only)] if flags.only else []
    experiment.main([CONFIG, "--out", flags.work, *only])
    rows = Graph(read_experiment(CONFIG, [], work).only(flags.only), work).rows
    sd = StableDiffusion.from_checkpoint(find("configs/backbone/pocket.yaml"))
    tools = Tools(**vars(Networks("pocket", "pocket", "cpu")) | {"mask_prompts": TEMPLATES})
    results = []
    for row in rows:
        swept = sweep(row, work / "cache", sd, tools, flags.samples)
        results.append(result(row.variant.name, row.subject.name, Path(row.path), swept))
        write(Path(flags.out), (json.dumps(results, indent=1) + "\n").encode())
    print(table(results))


if __name__ == "__main__":
    main()
