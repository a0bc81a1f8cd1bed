"""Holds figures that were made again against those that are committed.

    python -m scripts.pocket.compare --methods infusion --ablations none --concepts zigzag_hat --seeds 1 \\
        --work outputs/again --out outputs/again/report
    python -m scripts.pocket.remade results/pocket/metrics.json outputs/again/report/metrics.json

Prints, for each figure of each run that both files have, how many standard errors of the committed figure they are
apart; ends with exit code 1 where that is more than `WIDTH` for any.
"""

from collections.abc import Iterator, Sequence

from infusion.metrics.report.aggregate import Result
from infusion.metrics.report.markdown import read
from ldm.util.cli import Parser, UserError, report

WIDTH = 1.96  # of a 95 % interval, in standard errors
ROUNDING = 1e-6  # of figures that have no error, such as zeros by construction


def apart(before: Sequence[Result], again: Sequence[Result]) -> Iterator[tuple[str, str, float, float, float]]:
    """Label, metric, both values and their distance in standard errors, of what both have.

    Raises:
        UserError: no run is in both.
    """
    ours, theirs = ({run["label"]: run["figures"] for run in runs} for runs in (before, again))
    labels = [label for label in ours if label in theirs]
    if not labels:
        raise UserError(f"no run is in both files; there are {', '.join(ours)} and {', '.join(theirs)}")
    for label in labels:
        first, second = ours[label], theirs[label]
        for metric in (name for name in first if name in second):
            old, new = first[metric], second[metric]
            error = max(old["stderr"] or 0.0, ROUNDING)
            yield label, metric, old["value"], new["value"], abs(new["value"] - old["value"]) / error


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("before", metavar="FILE", help="metrics.json that is committed")
    parser.add_argument("again", metavar="FILE", help="one of some of its runs, made again")
    flags = parser.parse_args(arguments)
    found = list(apart(read(flags.before), read(flags.again)))
    for label, metric, old, new, distance in found:
        print(f"{label}  {metric:20}  {old:10.4f}  {new:10.4f}  {distance:6.2f}")
    raise SystemExit(int(max(distance for *_, distance in found) > WIDTH))


if __name__ == "__main__":
    main()
