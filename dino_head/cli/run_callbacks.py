"""Callbacks that `dino-head fit` adds to every run."""

import shlex
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class CheckpointOnInterrupt(Callback):
    """On Ctrl-C, saves a checkpoint at the end of the batch and stops; a second Ctrl-C stops at once.

    A resumed run then equals an uninterrupted one. Add this callback after all others.

    Args:
        out: Folder of the run; the checkpoint is out/checkpoints/interrupted.ckpt.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.has_trained = False  # in this process
        self.is_interrupted = False
        self.handler = signal.getsignal(signal.SIGINT)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle Ctrl-C from now on, as there is something to save."""
        self.is_interrupted = False
        signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        if self.is_interrupted:
            raise KeyboardInterrupt
        self.is_interrupted = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save a checkpoint and stop, after Ctrl-C."""
        self.has_trained = True
        if self.is_interrupted:
            file = self.out / "checkpoints" / "interrupted.ckpt"
            trainer.save_checkpoint(file)
            print(f"\nstopped and saved {file}. {how_to_resume(self.out)}")
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the handler of Ctrl-C."""
        signal.signal(signal.SIGINT, self.handler)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the handler of Ctrl-C."""
        signal.signal(signal.SIGINT, self.handler)


def how_to_resume(out: Path) -> str:
    """Text with the command that resumes a run."""
    return f"Resume with: dino-head fit --resume --out {shlex.quote(str(out))}"


class CheckBackbone(Callback):
    """Before the first step, raises ValueError if backbone, head and loss do not fit the views and each other.

    It checks modules like the examples' DINO, with `student["backbone"]`, `student["head"]`, `images(batch)` and
    `augment`, and the `loss` if it is a DINOLoss, in the precision of the run.
    """

    is_done = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check with two images of the first batch; random states do not change."""
        if self.is_done or not all(hasattr(pl_module, name) for name in ("student", "images", "augment")):
            return
        from dino_head import DINOLoss
        from dino_head.vision import check_backbone

        self.is_done = True
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            views = pl_module.augment(pl_module.images(batch)[:2])  # type: ignore[operator]
            student: Any = pl_module.student
            loss = getattr(pl_module, "loss", None)
            with trainer.precision_plugin.train_step_context():
                check_backbone(
                    student["backbone"],
                    student["head"],
                    trainer.precision_plugin.convert_input(views),
                    loss if type(loss) is DINOLoss else None,  # a subclass may have arguments of its own
                )
