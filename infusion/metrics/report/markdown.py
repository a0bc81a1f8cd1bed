"""A `metrics.json` as a Markdown table, for a README.

    python -m infusion.metrics.report.markdown results/pocket/metrics.json --metrics clip_i,lfd_context

A row for what the figures are read against, and one for each group: mean ± standard error over concepts. An asterisk
says that the 95 % interval of the difference from the first group, over the concepts that both have, leaves 0 out.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from infusion.metrics.report.aggregate import Result, figures_of, groups_of
from infusion.metrics.report.page import against, differs, table
from infusion.metrics.report.words import METRICS
from ldm.util.cli import Parser, UserError, report, suggestion, words
from ldm.util.config import find


def read(path: str | Path) -> list[Result]:
    """The results in a `metrics.json`; raises UserError for another file."""
    try:
        methods = json.loads(find(path).read_text(encoding="utf-8"))["methods"]
        return [{"label": label, **about, "figures": about["figures"]} for label, about in methods.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is no metrics.json ({error})") from error


def markdown(results: Sequence[Result], metrics: Sequence[str]) -> str:
    """The table; raises ValueError for a metric that no result has."""
    everything, groups = figures_of(results), groups_of(results)
    if unknown := [name for name in metrics if name not in everything]:
        raise UserError(f"--metrics: nothing has `{unknown[0]}`{suggestion(unknown[0], list(everything))}")
    beside = table(against(everything, metrics), metrics)
    ours = table([(group.label.replace("_", " "), group.figures, group.anchored) for group in groups], metrics)
    for row, group in enumerate(groups):
        for column, name in enumerate(metrics):
            found = group.figures.get(name, {}).get("difference")
            if found and found["low"] is not None and differs(found):
                ours.iloc[row, column] += "*"
    heads = [METRICS[name].family + title for name, title in zip(metrics, ours.columns, strict=True)]
    lines = [["", *heads], ["---"] * (len(metrics) + 1)]
    lines += [[f"*{label}*", *cells] for label, *cells in beside.itertuples()]
    lines += [[label, *cells] for label, *cells in ours.itertuples()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="metrics.json")
    parser.add_argument("--metrics", metavar="M[,M]", type=words, help="columns", default="clip_i,clip_t,lfd_context")
    flags = parser.parse_args(arguments)
    print(markdown(read(flags.file), flags.metrics))


if __name__ == "__main__":
    main()
