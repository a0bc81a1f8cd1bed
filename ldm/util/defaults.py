"""Files that commands take where no flag names one: relative to the working directory, or else to the repository.

Commands show them in `--help`, so nothing that is slow to import is needed here.
"""

from pathlib import Path

CLIPSEG = "ckpt/clipseg-rd64-refined"
POCKET = "pocket"  # names the pocket world's own network where a flag wants a folder or file
POCKET_CLIP = Path("ckpt/pocket/clip.safetensors")
POCKET_CLIPSEG = Path("ckpt/pocket/clipseg.safetensors")
POCKET_CLASSIFIER = Path("ckpt/pocket/classifier.safetensors")
