"""Copies a folder of photos, and masks the copies by CLIPSeg where flags of data/soft_segment.py say how.

python scripts/experiments/photos.py photos/cat copies/cat --super_class cat
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data.soft_segment as soft_segment
from data.photos import MASK_LABEL, MASKS, OVERLAYS
from ldm.util.cli import report


@report
def main(arguments: list[str] | None = None) -> None:
    folder, copies, *flags = sys.argv[1:] if arguments is None else arguments
    made = (MASKS, f"*{MASK_LABEL}") if flags else ()  # what takes their place
    left = shutil.ignore_patterns(OVERLAYS, ".*", *made)
    shutil.copytree(folder, copies, dirs_exist_ok=True, ignore=left)
    if flags:
        soft_segment.main(["--image_dir", copies, *flags])


if __name__ == "__main__":
    main()
