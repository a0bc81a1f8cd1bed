"""The command `scripts/estimate_C_inv.py`, under the name that guides to this method use."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parents[1] / "scripts/estimate_C_inv.py"), run_name="__main__")
