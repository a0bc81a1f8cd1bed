"""A `metrics.json` as a Markdown table, for a README.

    python -m infusion.metrics.report.markdown results/pocket/metrics.json --metrics clip_i,lfd_context

A row for what the figures are read against, and one for each group: mean ± standard error over concepts. An asterisk
says that the 95 % interval of the difference from the first group, over the concepts that both have, leaves 0 out.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from infusion.metrics.report.aggregate import Result, figures_of, groups_of
from infusion.metrics.report.rows import against_rows, differs, group_rows
from infusion.metrics.report.words import HIGHER, LOWER, METRICS
from ldm.util.config import find
from ldm.util.errors import Parser, UserError, report, suggestion
from ldm.util.flags import words

FAMILY = {"lfd": "LFD, ", "w2": "W2, "}  # titles say no more than which of these it is
ARROWS = {HIGHER: " ↑", LOWER: " ↓"}


def read(path: str | Path) -> list[Result]:
    """The results in a `metrics.json`; raises UserError for another file."""
    try:
        methods = json.loads(find(path).read_text(encoding="utf-8"))["methods"]
        return [{"label": label, **about, "figures": about["figures"]} for label, about in methods.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is no metrics.json ({error})") from error


def table(results: Sequence[Result], metrics: Sequence[str]) -> str:
    """Rows of text; raises ValueError for a metric that no result has."""
    everything, groups = figures_of(results), groups_of(results)
    if unknown := [name for name in metrics if name not in everything]:
        raise ValueError(f"--metrics: nothing has `{unknown[0]}`{suggestion(unknown[0], list(everything))}")
    lines = [["", *map(title, metrics)], ["---"] * (len(metrics) + 1)]
    for row in against_rows(everything, metrics):
        lines.append([f"*{row['label']}*", *(_cell(cell) for cell in row["cells"])])
    for group, row in zip(groups, group_rows(groups, metrics), strict=True):
        known = [group.figures.get(name, {}).get("difference") for name in metrics]
        marks = ["*" if one and one["low"] is not None and differs(one) else "" for one in known]
        cells = [_cell(cell) + mark for cell, mark in zip(row["cells"], marks, strict=True)]
        lines.append([row["label"].replace("_", " "), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def title(metric: str) -> str:
    """A column's heading, with the way that is better."""
    return FAMILY.get(metric.split("_")[0], "") + METRICS[metric].title + ARROWS.get(METRICS[metric].better, "")


def _cell(cell: dict[str, str] | None) -> str:
    return " ".join(filter(None, (cell["value"], cell["error"]))) if cell else ""


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="metrics.json")
    parser.add_argument("--metrics", metavar="M[,M]", type=words, help="columns", default="clip_i,clip_t,lfd_context")
    flags = parser.parse_args(arguments)
    print(table(read(flags.file), flags.metrics))


if __name__ == "__main__":
    main()
