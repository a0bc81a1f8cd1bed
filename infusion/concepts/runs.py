"""The concept files of a run folder."""

import logging
from pathlib import Path

from ldm.util.cli import UserError
from ldm.util.folders import is_run

RUN = "step=*.safetensors"  # in a run folder's models/
logger = logging.getLogger(__name__)


def concept_files(path: str | Path) -> list[Path]:
    """A concept file itself, or those of a run folder of main.py in the order of training.

    A folder of another tool, such as a diffusers folder, stays what it is.

    Raises:
        UserError: the run has no concept file, or has several concepts.
    """
    found = Path(path)
    if not found.is_dir():
        return [found]
    models = found / "models" if (found / "models").is_dir() else found
    if files := sorted(models.glob(RUN)):
        return files
    if several := sorted({file.parent for file in models.glob(f"*/{RUN}")}):
        raise UserError(f"{path}: a run of {len(several)} concepts: name one of them, such as {several[0]}")
    if is_run(found):
        raise UserError(f"{path}: a run without models/{RUN}: it has not reached its first concept file")
    return [found]


def concept_file(path: str | Path) -> Path:
    """A concept file itself, or the last one of a run folder, which a line names; UserError as `concept_files`."""
    files = concept_files(path)
    if files[-1] != Path(path):
        logger.info("%s: %s, the last of %d concept files", path, files[-1].name, len(files))
    return files[-1]
