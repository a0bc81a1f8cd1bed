"""The log of a training."""

from pathlib import Path

from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter


class Log(TensorBoardLogger):
    """TensorBoard's, which goes on when somebody removes its folder."""

    @property
    def experiment(self) -> SummaryWriter:
        """The writer; its folder is there."""
        if self._experiment is not None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
        return super().experiment
