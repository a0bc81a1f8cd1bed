"""Results on disk: `metrics.json`, `metrics.csv`, `plots/` and `report.html` in one folder."""

import json
from pathlib import Path

from infusion.concepts.concept import now
from infusion.metrics.report.charts import plots
from infusion.metrics.report.page import page
from infusion.metrics.report.table import CSV, JSON, PLOTS, REPORT, Measured, table
from ldm.util.files import write as write_file


def write(out: str | Path, measured: Measured) -> Path:
    """Write everything, `metrics.json` first, by which the folder is known; returns the report's path.

    Raises:
        UserError: the folder cannot be written.
    """
    out, drawn = Path(out), plots(measured.groups)
    text = json.dumps({"date": now()} | measured.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(out / JSON, text.encode())
    for name, svg in drawn.items():
        write_file(out / PLOTS / f"{name}.svg", svg.encode())
    write_file(out / CSV, table(measured.results).encode())
    write_file(out / REPORT, page(measured, drawn).encode())
    return out / REPORT
