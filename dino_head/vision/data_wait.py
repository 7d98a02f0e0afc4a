"""A callback that measures how long training waits for data."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class DataWait(Callback):
    """Logs `data_wait`, the share of an epoch's time in which training waited for its next batch.

    Near 0, the device is busy. Otherwise, loading is too slow: use more workers, smaller files or a faster disk.

    Attributes:
        share: Share of the last epoch, in [0, 1]; None before the first epoch ends.
    """

    def __init__(self) -> None:
        self.share: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock if a run is resumed inside an epoch, where Lightning does not call on_train_epoch_start."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.start = self.since = time.perf_counter()
        self.waited = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Add the time since the last batch."""
        self.waited += time.perf_counter() - self.since

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Start to wait for the next batch."""
        self.since = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the share."""
        self.share = self.waited / (self.since - self.start)
        pl_module.log("data_wait", self.share, prog_bar=True, sync_dist=True)
