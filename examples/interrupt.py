"""Ctrl-C and the checkpoints of a run that was stopped."""

import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted((out / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime)


def check_readable(file: Path) -> None:
    """Raise ValueError if the file is not a whole checkpoint."""
    try:
        torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # whatever is in the file
        raise ValueError(
            f"{file} is no whole checkpoint ({type(error).__name__}). Nothing was changed: go on from another one. (To "
            "resume a run from the one before it, move this one away.)"
        ) from None


class StopAtBatchEnd(Callback):
    """Lets Ctrl-C end the run after its batch, with a checkpoint from which it goes on exactly; for the last place."""

    def __init__(self, file: Path) -> None:
        self.file, self.is_asked, self.handler = file, False, signal.getsignal(signal.SIGINT)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to save."""
        self.is_asked = False
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: Any) -> None:
        if self.is_asked:  # Ctrl-C for the second time: at once
            raise KeyboardInterrupt
        self.is_asked = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save, and say how to go on."""
        if self.is_asked:
            trainer.save_checkpoint(self.file)
            print(f"\nstopped: {self.file} is written; go on with --resume --out {self.file.parents[1]}")
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ctrl-C as it was."""
        signal.signal(signal.SIGINT, self.handler)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ctrl-C as it was."""
        signal.signal(signal.SIGINT, self.handler)
