"""Checks results that somebody sends (results/contributed/README.md).

python scripts/contributed.py results/contributed/somebody-sd15
"""

import json
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import OmegaConf

from ldm.util.cli import Parser, UserError, naming, report
from ldm.util.config import ROOT, find, load_config
from scripts.weights import SD15

FORM = {"card": str, "commit": str, "command": str, "hours": (int, float), "by": str, "notes": str}


def check_form(path: Path) -> None:
    """Raises UserError for a form that is not filled in."""
    form = OmegaConf.to_container(load_config(path))
    if odd := sorted(form.keys() ^ FORM.keys()):
        raise UserError(f"`{odd[0]}` is {'unknown' if odd[0] in form else 'lacking'}; the keys are {', '.join(FORM)}")
    for key, kind in FORM.items():
        if not isinstance(form[key], kind) or (key != "notes" and not form[key]):
            raise UserError(f"{key}: fill it in, as results/contributed/README.md shows")
    if not re.fullmatch("[0-9a-f]{40}", form["commit"]):
        raise UserError("commit: the 40 digits that `git rev-parse HEAD` prints are wanted")
    words = shlex.split(form["command"])
    if words[:2] != ["python", "scripts/experiment.py"] or not any((ROOT / word).is_file() for word in words[2:]):
        raise UserError("command: a python scripts/experiment.py with one of configs/experiment/ is wanted")


def check_figures(folder: Path) -> list[str]:
    """What is noteworthy; raises UserError for figures that do not agree with each other."""
    from infusion.metrics.report.output import Measured, read

    said = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    measured = Measured(read(folder / "metrics.json"), said["settings"], said["files"], said["command"])
    if json.loads(json.dumps(measured.as_dict()))["groups"] != said["groups"]:
        raise UserError("metrics.json: `groups` are not what its rows give: it was edited, or is of another version")
    if measured.as_csv() != (folder / "metrics.csv").read_text(encoding="utf-8"):
        raise UserError("metrics.csv: is not of this metrics.json")
    notes = [
        f"{one['label']}: {one['photos_used']} photos were used, {one['photos_left_out']} left out: say in `notes` why"
        for one in measured.results
        if one.get("photos_left_out")
    ]
    if said["settings"].get("architecture") == "sd15" and said["files"].get("base") != SD15:
        notes.append("the base model is not the published SD 1.5: say in `notes` which it is")
    return notes


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description="Checks results that somebody sends.")
    parser.add_argument("folder", metavar="DIR", help="such as results/contributed/somebody-sd15")
    folder = find(parser.parse_args(arguments).folder)
    for name in ("form.yaml", "metrics.json", "metrics.csv"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: there is no {name}: see results/contributed/README.md")
    with naming(f"{folder / 'form.yaml'}"):
        check_form(folder / "form.yaml")
    for note in check_figures(folder):
        print(f"note: {note}")
    print(f"{folder}: complete, and its figures agree with each other")


if __name__ == "__main__":
    main()
