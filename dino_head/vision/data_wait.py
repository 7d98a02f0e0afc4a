"""How long training waits for its data."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class DataWait(Callback):
    """Logs `data_wait`: the share of an epoch's time in which training waited for its next batch.

    Near 0 the device is busy. Else the data are late: more workers, smaller files, a faster disk.
    """

    def __init__(self) -> None:
        self.share: float | None = None  # of the last epoch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to wait; an epoch into which a run is resumed has no other start."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to wait."""
        self.start = self.since = time.perf_counter()
        self.waited = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Here it is."""
        self.waited += time.perf_counter() - self.since

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Wait for the next."""
        self.since = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum up."""
        self.share = self.waited / (self.since - self.start)
        pl_module.log("data_wait", self.share, prog_bar=True, sync_dist=True)
