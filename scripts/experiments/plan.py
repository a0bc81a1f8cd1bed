"""What an experiment takes: a few steps of every config and a few samples are measured, and scaled.

A task's seconds are `start + each · count`, where count is of training steps, samples or class images. The figures are
kept in `probe/costs.json`: they also say how long is left while the experiment runs.
"""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from omegaconf import OmegaConf

import main as training
from infusion.metrics.run.protocol import KEYS, PLAIN, Protocol, usual_file
from ldm.training.config import read_config
from ldm.util.cli import UserError
from ldm.util.files import write
from scripts.experiments.config import Experiment, Variant, arguments
from scripts.experiments.graph import KINDS, Graph, Task
from scripts.experiments.run import Driver, duration, seconds_of

STEPS, FEW, MORE, IMAGES = 8, 4, 14, 8  # training steps, samples, more samples, class images of the probe


def probe(experiment: Experiment, out: Path, driver: Driver) -> None:
    """Trains each config and measures it, shortly and on the first subject, and writes what that took.

    Raises:
        UserError: a task of the probe failed.
    """
    trained = {variant.like: variant for variant in reversed(experiment.variants) if variant.config}
    variants = tuple(shorter(variant, experiment) for variant in reversed(trained.values()))
    if not variants:
        raise UserError("--plan: nothing is trained here; measuring starts at once")
    subject = replace(experiment.subjects[0], protocol=few_prompts(experiment, variants[0], out / "probe"))
    small = replace(experiment, subjects=(subject,), seeds=experiment.seeds[:1], variants=variants)

    def run(samples: int | None, variants: tuple[Variant, ...]) -> Graph:
        measure = None if samples is None else dict(experiment.measure) | {"samples": samples}
        graph = Graph(replace(small, measure=measure, variants=variants), out / "probe")
        driver.run(graph.tasks)
        if driver.failed:
            task, why = next(iter(driver.failed.items()))
            raise UserError(f"--plan: {task.shown()}: {why}; see {task.log}")
        return graph

    if experiment.measure is None:
        graph = run(None, variants)
    else:
        first = seconds_of(run(FEW, variants[:1]).measures[0])  # without what the base model has in common
        graph = run(MORE, variants)
    found: dict[str, dict] = {"photos": {"": {"start": seconds_of(graph.tasks[0]), "each": 0.0, "bytes": 0.0}}}
    for task in graph.tasks:
        if task.kind == "train":
            each, files = seconds_a_step(task.result), list(task.result.glob("models/step=*.safetensors"))
            size = fmean(file.stat().st_size for file in files)
            start = max(0.0, seconds_of(task) - STEPS * each)
            found.setdefault("train", {})[task.like] = {"start": start, "each": each, "bytes": size}
        if task.kind == "class images":
            found[task.kind] = {"": {"start": 0.0, "each": seconds_of(task) / IMAGES, "bytes": 0.0}}
    if experiment.measure is not None:
        found |= measuring(graph, first, out / "probe" / "cache")
    write(out / "probe" / "costs.json", (json.dumps(found, indent=1) + "\n").encode())


def shorter(variant: Variant, experiment: Experiment) -> Variant:
    """A few steps, and as many concept files as the whole training would have."""
    subject = experiment.subjects[0]
    config = read_config(training.parse(arguments(variant, subject, 0, subject.folder)))
    every = OmegaConf.select(config, "callbacks.concept.params.every")
    words = [f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1"]
    words += [f"callbacks.concept.params.every={max(1, STEPS * every // config.trainer.max_steps)}"] if every else []
    has_prior = OmegaConf.select(config, "data.params.prior.params") is not None
    words += [f"data.params.prior.params.count={IMAGES}"] if has_prior else []
    return replace(variant, overrides=(*variant.overrides, *words), seeds=())


def few_prompts(experiment: Experiment, variant: Variant, folder: Path) -> str:
    """A protocol with two prompts of each kind, so that a few samples suffice for every metric."""
    subject = experiment.subjects[0]
    config = read_config(training.parse(arguments(variant, subject, 0, subject.folder)))
    named = subject.protocol or (experiment.measure or {}).get("protocol") or usual_file(config.sd.params.name)
    said = Protocol.load(named).as_dict()
    file = folder / "protocol.yaml"
    short = {key: said[key][:2] if key in ("concept", *PLAIN) else said[key] for key in KEYS}
    write(file, OmegaConf.to_yaml(short).encode())
    return str(file)


def seconds_a_step(run: Path) -> float:
    """By the log's times, without the first step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # it takes seconds

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    first, *_, last = events.Scalars("train/loss")[1:]
    return (last.wall_time - first.wall_time) / (last.step - first.step)


def measuring(graph: Graph, first: float, cache: Path) -> dict[str, dict]:
    """Costs of measuring: the first row was measured with FEW samples in `first` s, then continued to MORE; the others
    find the base model's samples there."""
    again, *others = map(seconds_of, graph.measures)
    both = max(0.0, again - first) / (MORE - 2 * FEW)  # of a sample of the concept and its share of the base model's
    start = max(0.0, first - FEW * both)
    each = [max(0.0, seconds - start) / MORE for seconds in others]
    each.insert(0, min(both, fmean(each)) if each else both / 2)
    size = sum(file.stat().st_size for file in cache.iterdir()) / MORE / (1 + len(each))
    costs = {
        task.like: {"start": start, "each": own, "bytes": size} for task, own in zip(graph.measures, each, strict=True)
    }
    return {"measure": costs, "base": {"": {"start": 0.0, "each": both - each[0], "bytes": size}}}


class Costs:
    """What a probe has found in the folder of an experiment, if there was one."""

    def __init__(self, out: Path) -> None:
        file = out / "probe" / "costs.json"
        self.found = json.loads(file.read_text()) if file.is_file() else {}

    def of(self, task: Task) -> dict[str, float] | None:
        kind = self.found.get({"report": "measure"}.get(task.kind, task.kind), {})
        return kind.get(task.like) or kind.get("") or next(iter(kind.values()), None)

    def seconds(self, task: Task) -> float | None:
        """Expected; None where nothing is known."""
        cost = self.of(task)
        if cost is None:
            return None
        base = self.found["base"][""]["each"] if task.kind == "measure" and not task.after else 0.0
        return cost["start"] + (cost["each"] + base) * task.count

    def bytes(self, task: Task) -> float:
        """Expected on the disk, in the end."""
        cost = self.of(task)
        return 0.0 if cost is None else cost["bytes"] * (task.files if task.kind == "train" else task.count)

    def table(self, graph: Graph, driver: Driver) -> str:
        """What is left to do, in lines."""
        tasks = [*graph.tasks, *([graph.report(graph.rows)] if graph.measures else [])]
        left = [task for task in tasks if not task.is_done]
        lines = [f"{'':14} tasks  left        each  together"]
        for kind in KINDS:
            own = [self.seconds(task) or 0.0 for task in left if task.kind == kind]
            every = sum(task.kind == kind for task in tasks)
            if own:
                lines.append(f"{kind:14} {every:5} {len(own):5} {duration(fmean(own)):>11} {duration(sum(own)):>9}")
        seconds, size = sum(self.seconds(task) or 0.0 for task in left), sum(map(self.bytes, left))
        unit, taken = ("GPU", driver.gpus) if driver.gpus else ("core", driver.cores)
        lines.append(f"about {seconds * taken / 3600:.2g} {unit} hours, {size / 1e9:.2g} GB; ")
        lines[-1] += f"{duration(seconds / driver.slots)} with {driver.slots} tasks at a time"
        return "\n".join(lines)
