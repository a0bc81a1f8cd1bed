"""Copies a folder of photos, and masks the copies by CLIPSeg where flags of data/soft_segment.py say how.

python scripts/experiments/photos.py photos/cat copies/cat --super_class cat
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data.soft_segment as soft_segment
from data.photos import is_image
from ldm.util.cli import report


@report
def main(arguments: list[str] | None = None) -> None:
    folder, copies, *flags = sys.argv[1:] if arguments is None else arguments
    source, target = Path(folder), Path(copies)
    target.mkdir(parents=True, exist_ok=True)
    if not flags:
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("overlay", ".*"))
        return
    for photo in filter(is_image, source.iterdir()):
        shutil.copyfile(photo, target / photo.name)
        if (caption := photo.with_suffix(".txt")).is_file():
            shutil.copyfile(caption, target / caption.name)
    soft_segment.main(["--image_dir", str(target), *flags])


if __name__ == "__main__":
    main()
