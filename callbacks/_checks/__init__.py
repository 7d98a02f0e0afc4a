"""What every callback of this library checks while a Trainer trains: modes, and that the teacher follows."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from dino_head.callbacks._checks.layout import Pairs
from dino_head.callbacks._checks.modes import check_modes
from dino_head.callbacks._checks.teacher import TeacherCheck

DEFAULT_PAIRS = (("student", "teacher"),)


class Checked(Callback):
    """Base class of the callbacks. The first of them in a Trainer checks modes and teacher, once for all.

    Modes are checked at the first batch of each epoch, when all hooks that may set them have been called.
    """

    teacher_check: TeacherCheck | None = None  # of this run, the same for all callbacks of the Trainer
    _is_first = False
    _checked_epoch = -1
    _mode_warnings: frozenset[str] = frozenset()

    @property
    def updated_pairs(self) -> Pairs:
        """Names of the (student, teacher) submodules that this callback updates."""
        return ()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the checks."""
        ours = _ours(trainer)
        self._is_first = ours[0] is self
        if self._is_first:
            check = TeacherCheck(trainer, pl_module, _pairs(trainer))
            for callback in ours:
                callback.teacher_check = check
            self._checked_epoch, self._mode_warnings = -1, frozenset()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check, when all hooks of the previous batch have been called."""
        if not self._is_first or self.teacher_check is None:
            return
        if trainer.current_epoch != self._checked_epoch:
            self._checked_epoch = trainer.current_epoch
            self._check_modes(trainer, pl_module)
        self.teacher_check.look(trainer)
        self.teacher_check.follow_next()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check after the last batch."""
        if self._is_first and self.teacher_check is not None:
            self.teacher_check.look(trainer, is_last=True)

    def _check_modes(self, trainer: Trainer, pl_module: LightningModule) -> None:
        modules = dict(pl_module.named_modules())
        pairs = _pairs(trainer) or [pair for pair in DEFAULT_PAIRS if modules.keys() >= {*pair}]
        warnings = frozenset(check_modes(pl_module, pairs))
        for warning in warnings - self._mode_warnings:
            rank_zero_warn(warning)
        self._mode_warnings |= warnings


def _ours(trainer: Trainer) -> list[Checked]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Checked)]  # type: ignore[attr-defined]


def _pairs(trainer: Trainer) -> list[tuple[str, str]]:
    return [pair for callback in _ours(trainer) for pair in callback.updated_pairs]
