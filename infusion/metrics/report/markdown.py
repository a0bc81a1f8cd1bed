"""A `metrics.json` as a Markdown table, for a README; with --rewrite also its statistics and plots, anew.

python -m infusion.metrics.report.markdown results/pocket/metrics.json --metrics clip_i,lfd_context
"""

import json
from pathlib import Path

from infusion.metrics.report.aggregate import Group, groups_of
from infusion.metrics.report.output import PLOTS, dump, read
from infusion.metrics.report.plots import plots
from infusion.metrics.report.tables import markdown, notes, table
from ldm.util.cli import Parser, UserError, report, suggestion, words
from ldm.util.config import find
from ldm.util.files import write


def rewrite(path: Path, groups: list[Group]) -> None:
    """The groups' figures in a metrics.json and the plots beside it; what was measured stays as it is."""
    said = json.loads(path.read_text(encoding="utf-8")) | {"groups": {group.name: group.figures for group in groups}}
    write(path, dump(said))
    for name, svg in plots(groups).items():
        write(path.parent / PLOTS / f"{name}.svg", svg.encode())


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="metrics.json")
    parser.add_argument("--metrics", metavar="M[,M]", type=words, help="columns", default="clip_i,clip_t,lfd_context")
    parser.add_argument("--rewrite", action="store_true", help="write the groups' figures and plots again")
    flags = parser.parse_args(arguments)
    groups = groups_of(read(flags.file))
    known = list(dict.fromkeys(name for group in groups for name in group.figures))
    if unknown := [name for name in flags.metrics if name not in known]:
        raise UserError(f"--metrics: nothing has `{unknown[0]}`{suggestion(unknown[0], known)}")
    if flags.rewrite:
        rewrite(find(flags.file), groups)
    print(markdown(table(groups, flags.metrics)), notes(groups), sep="\n\n")


if __name__ == "__main__":
    main()
