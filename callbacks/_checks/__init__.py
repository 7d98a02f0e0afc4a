"""Checks that every callback of this library runs during training: modes, and updates of the teacher."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from dino_head.callbacks._checks.layout import DEFAULT, Pairs
from dino_head.callbacks._checks.modes import check_modes
from dino_head.callbacks._checks.teacher import TeacherCheck

INSIDE_WINDOW = "dino_head_inside_accumulation_window"  # key of a checkpoint
LOST = (
    ": Lightning saves no gradients, so a resumed run loses those of the window and differs from an uninterrupted one. "
    "Write checkpoints after optimizer steps, with ModelCheckpoint(every_n_train_steps=...), and set "
    "val_check_interval to a multiple of accumulate_grad_batches"
)


class Checked(Callback):
    """Base class of the callbacks. The first of them in a Trainer checks modes and teacher for all.

    Modes are checked at the first batch of each epoch, after all hooks that may set them. A checkpoint that is written
    inside an accumulation window causes a warning when it is written and when a run is resumed from it.
    """

    teacher_check: TeacherCheck | None = None  # during training, the same for all callbacks of the Trainer
    outcome = "not checked"  # of the teacher's check in the last run
    _is_first = False
    _holds_gradients = False  # whether a backward has run since the last optimizer step
    _checked_epoch = -1
    _reported: frozenset[str] = frozenset()

    @property
    def updated_pairs(self) -> Pairs:
        """Names of the (student, teacher) submodules that this callback updates."""
        return ()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the checks."""
        ours = _ours(trainer) or [self]  # self: inside a user's callback that delegates to it
        self._is_first = ours[0] is self
        if self._is_first:
            check = TeacherCheck(trainer, pl_module, _pairs(trainer))
            for callback in ours:
                callback.teacher_check, callback.outcome = check, check.outcome
            self._checked_epoch, self._reported, self._holds_gradients = -1, frozenset(), False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Run the checks, after all hooks of the previous batch."""
        if not self._is_first or self.teacher_check is None:
            return
        if trainer.current_epoch != self._checked_epoch:
            self._checked_epoch = trainer.current_epoch
            self._check_modes(trainer, pl_module)
        self.teacher_check.look(trainer)
        self.teacher_check.follow_next()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there are gradients."""
        self._holds_gradients = pl_module.automatic_optimization

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note that the optimizer uses the gradients."""
        self._holds_gradients = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warn if the checkpoint is written inside an accumulation window."""
        if self._is_first and self._holds_gradients and INSIDE_WINDOW not in checkpoint:
            checkpoint[INSIDE_WINDOW] = True
            self._warn(
                f"a checkpoint was written inside an accumulation window (epoch {trainer.current_epoch}, batch "
                f"{trainer.fit_loop.batch_idx}){LOST}"
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warn if the checkpoint was written inside an accumulation window."""
        if checkpoint.get(INSIDE_WINDOW) and (_ours(trainer) or [self])[0] is self:
            self._warn(f"the run is resumed from a checkpoint that was written inside an accumulation window{LOST}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the checks after the last batch."""
        if self._is_first and self.teacher_check is not None:
            self.teacher_check.look(trainer, is_last=True)
        self._end_check()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the checks."""
        self._end_check()

    def _end_check(self) -> None:
        """Keep the outcome, but no reference to the module."""
        if self.teacher_check is not None:
            self.teacher_check.end()
            self.outcome, self.teacher_check = self.teacher_check.outcome, None

    def _check_modes(self, trainer: Trainer, pl_module: LightningModule) -> None:
        modules = dict(pl_module.named_modules())
        pairs = _pairs(trainer) or [pair for pair in DEFAULT if modules.keys() >= {*pair}]
        for warning in check_modes(pl_module, pairs):
            self._warn(warning)

    def _warn(self, text: str) -> None:
        """Warn once in a run."""
        kind = text.split("(")[0]
        if kind not in self._reported:
            self._reported |= {kind}
            rank_zero_warn(text)


def _ours(trainer: Trainer) -> list[Checked]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Checked)]  # type: ignore[attr-defined]


def _pairs(trainer: Trainer) -> list[tuple[str, str]]:
    return [pair for callback in _ours(trainer) for pair in callback.updated_pairs]
