"""Are figures that were made again those of before, within the errors of both?

    python -m scripts.pocket.remade outputs/again/report/metrics.json        # against results/pocket/metrics.json

Both are noisy, so the error of their difference is the root of the sum of both errors' squares. Of figures that differ
by chance alone, one in twenty is outside 1.96 such errors.
"""

from math import hypot

import pandas as pd

from infusion.metrics.report.output import read
from ldm.util.cli import Parser, UserError, report

BOUND = 1.96  # of a normal law, for 95 %


def compare(again: list[dict], before: list[dict]) -> pd.DataFrame:
    """A row for each run and metric that both have: `apart`, the distance in errors of the difference."""
    known, rows = {one["label"]: one["figures"] for one in before}, []
    for one in again:
        for metric, figure in one["figures"].items():
            other = known.get(one["label"], {}).get(metric)
            if other is not None:
                step = abs(figure["value"] - other["value"])
                error = hypot(figure["stderr"] or 0, other["stderr"] or 0)
                apart = step / error if error else float("inf") if step else 0.0
                rows.append((one["label"], metric, figure["value"], other["value"], apart))
    return pd.DataFrame(rows, columns=["run", "metric", "again", "before", "apart"])


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("again", metavar="FILE", help="metrics.json of what was made again")
    parser.add_argument("--against", metavar="FILE", help="that of before", default="results/pocket/metrics.json")
    flags = parser.parse_args(arguments)
    found = compare(read(flags.again), read(flags.against))
    if found.empty:
        raise UserError(f"{flags.again}: has no run and metric that {flags.against} has")
    outside = found[found["apart"] > BOUND]
    print(f"{len(found) - len(outside)} of {len(found)} figures are within {BOUND} errors of the difference")
    print(outside.to_string(index=False) if len(outside) else "")


if __name__ == "__main__":
    main()
