"""Callbacks that `dino-head fit` adds to every run."""

import os
import shlex
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

TIME_IS_UP = 124  # exit code, as of the command `timeout`


class CheckpointOnInterrupt(Checkpoint):
    """On a signal or after a time limit, saves a checkpoint and stops, as soon as a run can resume exactly.

    The signals are Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2; the same one a second time stops at once. The run stops at the
    end of the batch, except where Lightning would not resume exactly: with a validation after the batch, it stops at
    the validation's end; inside an accumulation window, at the window's end; at the last batch of an epoch, at the
    epoch's end (with max_steps, at the end of the next batch). At the last batch of the run, it completes the run.

    All processes stop together, even if only one receives the signal. Under SLURM, the signal with which Lightning
    requeues a job (SIGUSR1) also requeues it here, after the checkpoint. Append this callback to `trainer.callbacks`,
    so that it runs after ModelCheckpoint.

    Args:
        out: Folder of the run; the checkpoint is out/checkpoints/interrupted.ckpt.
        max_seconds: Time limit, from now on; None for no limit.

    Attributes:
        has_trained: Whether this process has trained on a batch.
        exit_code: Exit code of a stopped run, 128 + number of the signal, or 124 after the time limit; 0 otherwise.
    """

    def __init__(self, out: Path, max_seconds: float | None = None) -> None:
        self.out = out
        self.deadline = float("inf") if max_seconds is None else time.monotonic() + max_seconds
        self.has_trained = False
        self.exit_code = 0
        self.has_saved = False
        self.received: list[int] = []  # signals
        self.group: dist.ProcessGroup | None = None  # of all processes, on CPUs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle the signals from now on, as there is something to save. Lightning restores the handlers."""
        if trainer.received_sigterm:  # by Lightning's handler, which only sets this
            self.received.append(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
                if hasattr(signal, name):  # Windows has two of them
                    signal.signal(getattr(signal, name), self._receive)
        if trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo")  # needs no device, which would first have to finish its work

    def _receive(self, number: int, _: Any) -> None:
        if number in self.received:
            raise KeyboardInterrupt
        self.received.append(number)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop, unless a validation or the end of the epoch follows; a resumed run would skip it."""
        self.has_trained = True
        if not trainer.is_last_batch and not _validates_after(trainer, batch_idx):
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after a validation inside an epoch."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop, except in a run with max_steps, which Lightning does not resume exactly from the end of an epoch."""
        if trainer.max_steps == -1 and trainer.current_epoch + 1 != trainer.max_epochs:
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        is_complete = trainer.should_stop or trainer.global_step == trainer.max_steps
        in_window = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch
        if is_complete or in_window:  # Lightning saves no gradients
            return
        code = torch.tensor(TIME_IS_UP if time.monotonic() > self.deadline else 0)
        if self.received:
            code = torch.tensor(128 + self.received[0])
        if self.group is not None:
            dist.all_reduce(code, dist.ReduceOp.MAX, self.group)
        if not code:
            return
        self.exit_code = int(code)
        file = self.out / "checkpoints" / "interrupted.ckpt"
        trainer.save_checkpoint(file)
        self.has_saved = True
        if trainer.is_global_zero:
            number = self.exit_code - 128
            cause = "after the time limit" if number < 0 else f"by {signal.Signals(number).name}"
            print(f"\nstopped {cause} and saved {file}. {how_to_resume(self.out)}", flush=True)
            slurm = trainer._accelerator_connector.cluster_environment
            if isinstance(slurm, SLURMEnvironment) and slurm.auto_requeue and number == slurm.requeue_signal:
                _requeue()
        raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Set the exit code, also of a run that is stopped at once."""
        if isinstance(exception, SIGTERMException):
            self.exit_code = 128 + signal.SIGTERM
        elif isinstance(exception, KeyboardInterrupt):
            self.exit_code = self.exit_code or 128 + (self.received or [signal.SIGINT])[0]
        if self.exit_code and not self.has_saved and trainer.is_global_zero:
            print(f"\nstopped at once, without a new checkpoint. {how_to_resume(self.out)}", flush=True)


def _validates_after(trainer: Trainer, batch_idx: int) -> bool:
    """Whether Lightning validates after this batch."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or not every or every == float("inf"):
        return False
    if epochs is None:  # counts batches over all epochs
        return (trainer.fit_loop.total_batch_idx + 1) % every == 0
    return (trainer.current_epoch + 1) % epochs == 0 and (batch_idx + 1) % every == 0


def _requeue() -> None:
    """Requeue the SLURM job of this process, as Lightning does."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
        print(f"requeued SLURM job {job}", flush=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"SLURM job {job} was not requeued: {error}", flush=True)


def how_to_resume(out: Path) -> str:
    """Text with the command that resumes a run."""
    return f"Resume with: dino-head fit --resume --out {shlex.quote(str(out))}"


class CheckBackbone(Callback):
    """Before the first step, raises ValueError if backbone, heads and loss do not fit the views and each other.

    It checks modules like the examples' DINO and DINOv2, with `student["backbone"]`, `student["head"]`,
    `images(batch)`, `augment`, and the `loss` if it is a DINOLoss, in the precision of the run. A module with a
    `patch_loss` has `student["patch_head"]`, or uses its head for patches too.
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
            patch_head = student["patch_head" if "patch_head" in student else "head"]
            with trainer.precision_plugin.train_step_context():
                check_backbone(
                    student["backbone"],
                    student["head"],
                    trainer.precision_plugin.convert_input(views),
                    loss if type(loss) is DINOLoss else None,  # a subclass may have arguments of its own
                    patch_head=patch_head if hasattr(pl_module, "patch_loss") else None,
                )
