"""The log of a training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

LOSS = "train/loss"  # the figure that TensorBoard shows beside the config


class Log(TensorBoardLogger):
    """TensorBoard's, which goes on when somebody removes its folder, and has the config among its hyperparameters."""

    @property
    def experiment(self) -> SummaryWriter:
        """The writer; its folder is there."""
        if self._experiment is not None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
        return super().experiment

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any], *_: object, **__: object) -> None:
        """Shows a config beside the loss; Lightning would show it beside a figure of its own that is always -1."""
        self.hparams = dict(params)  # for hparams.yaml
        for summary in hparams(flat(params), {LOSS: None}):  # the values come from the log
            self.experiment.file_writer.add_summary(summary)


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, bool | float | str]:
    """Nested mappings as one, with keys such as `data.params.seed`; lists as text."""
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
