"""Runs an experiment, subjects × variants × seeds, to its report, on the cores and GPUs that there are.

python scripts/experiment.py configs/experiment/pocket.yaml --plan     # what it takes, from a short measured probe
python scripts/experiment.py configs/experiment/pocket.yaml            # run it; the same command resumes it
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.util.cli import Parser, count, report, words, writable


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Runs an experiment: photos, class images, trainings, measurements, report.")
    add = parser.add_argument
    add("config", metavar="CONFIG", help="such as configs/experiment/pocket.yaml")
    add("overrides", nargs="*", metavar="key=value", help="of the config, such as seeds=[0]")
    add("--out", metavar="DIR", type=writable, help="None: outputs/experiments/<name of the config>")
    add("--plan", action="store_true", help="run a short probe, and say what the experiment takes")
    add("--only", metavar="N[,N]", type=words, help="names of variants and of subjects; None: all", default=())
    add("--retry-failed", action="store_true", help="once more what failed before")
    add("--address", help="of a Ray cluster, or auto; None: this machine alone", default=None)
    add("--cores", type=count, help="of this machine to use; None: all", default=None)
    flags = parser.parse_intermixed_args(arguments)
    if flags.address and flags.cores:
        parser.error("--cores: a cluster has its own")
    if "," in (flags.out or ""):
        parser.error("--out: a comma would end the name in lists of files: name another folder")
    return flags


@report
def main(arguments: list[str] | None = None) -> None:
    flags = parse(arguments)
    out = Path(flags.out or f"outputs/experiments/{Path(flags.config).stem}")
    from ldm.util.files import locked
    from scripts.experiments.config import read_experiment
    from scripts.experiments.graph import Graph
    from scripts.experiments.plan import Costs, probe
    from scripts.experiments.run import Driver

    experiment = read_experiment(flags.config, flags.overrides, out / "protocols").only(flags.only)
    graph = Graph(experiment, out)
    with locked(out):
        driver = Driver(out, experiment.cores, experiment.gpus, Costs(out).seconds, flags.address, flags.cores)
        if flags.plan:
            probe(experiment, out, driver)
            print(Costs(out).table(graph, driver))
            return
        driver.run(graph.tasks, flags.retry_failed)
        measured = zip(graph.rows, graph.measures, strict=True) if graph.measures else ()
        rows = [row for row, task in measured if task.is_done]
        page = graph.report(rows) if rows else None
        if page:
            driver.run([*graph.tasks, page], flags.retry_failed)
    for task, why in driver.failed.items():
        print(f"failed: {task.shown()}: {why}; see {task.log}", file=sys.stderr)
    if page and page.is_done:
        print(f"open {page.result / 'report.html'}")
    if driver.failed:
        print(f"{len(driver.failed)} failed; --retry-failed tries them once more", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
