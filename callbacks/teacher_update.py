"""The teacher as an exponential moving average of the student."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dino_head._arguments import check_number
from dino_head.callbacks._access import local_part, refuse_deepspeed
from dino_head.callbacks._horizon import OverTheRun
from dino_head.callbacks._losses import GuardedLosses
from dino_head.callbacks._pairs import find_parameters
from dino_head.schedules import cosine_schedule


class TeacherUpdateCallback(OverTheRun):
    """Moves all of the teacher's side after each optimizer step, once (arXiv:2104.14294, section 3.1).

        teacher <- m teacher + (1 - m) student,  m: cosine from base_momentum to final_momentum over the run
        center of each DINOLoss:  moved by the logits of all micro-batches of the step

    Parameters are averaged. Buffers are not: in train mode the teacher's batch norm follows the teacher's own batches,
    as in the authors' code. A step that a GradScaler skips moves nothing; its logits count for the next center.

    How: in `on_train_batch_end`, after the optimizer and before ModelCheckpoint, so that a checkpoint at any step holds
    the teacher of that step. While it trains, the callback also looks at each value of a DINOLoss (on a GPU this waits
    for the forward pass; a compiled loss has a graph break there) and stops before a NaN reaches the weights.

    Args:
        pairs: names of the (student, teacher) submodules of the LightningModule. What they leave out of a teacher never
            moves.
        base_momentum: m at the first update, in [0, 1].
        final_momentum: m at the end of the run, in [0, 1].
        total_steps: optimizer steps of the cosine; None: those of the run.
        allow_different_weights: a run may begin with a teacher that does not equal the student, to go on with weights
            from elsewhere.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: when training starts: a name that is not there, a pair of different structure, one
            object as both, weights that differ, a teacher that requires gradients, is in bf16 or fp16, or is sharded
            otherwise than the student, DeepSpeed, a run without an end, another length than that of the run resumed;
            during training: parameters that were replaced.
        FloatingPointError: a loss that is not finite; it says which side and the likely cause.
    """

    momentum: float | None = None  # for the next update, in place of the cosine; ScheduleCallback may set it

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]] = (("student", "teacher"),),
        base_momentum: float = 0.996,
        final_momentum: float = 1.0,
        *,
        total_steps: int | None = None,
        allow_different_weights: bool = False,
    ) -> None:
        super().__init__(total_steps)
        check_number("base_momentum", base_momentum, 0, 1)
        check_number("final_momentum", final_momentum, 0, 1)
        pairs = tuple(pairs)
        if not pairs or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
            raise ValueError(f'pairs must hold (student, teacher) names like (("student", "teacher"),), got {pairs!r}')
        self.pairs = tuple((student, teacher) for student, teacher in pairs)
        self.base_momentum = base_momentum
        self.final_momentum = final_momentum
        self.allow_different_weights = allow_different_weights
        self._parameters: list[tuple[Tensor, Tensor]] = []  # of student and teacher
        self._students: list[Tensor] = []  # this process's parts of them
        self._teachers: list[Tensor] = []
        self._losses: GuardedLosses | None = None
        self._ranks, self._centers = 1, 0
        self._is_checked = False  # that the parameters are still the module's once a step was made

    @property
    def receipt(self) -> str | None:
        """What was moved, how often, and with which momentum; None before the first update."""
        if not self.steps_taken:
            return None
        names = ", ".join(f"{teacher} followed {student}" for student, teacher in self.pairs)
        centers = f", {self._centers} center{'s' * (self._centers > 1)} with it" if self._centers else ""
        return (
            f"{names} for {self.progress()}, last with momentum {self.last_momentum:.6g}{centers}, on {self._ranks} of "
            f"{self._ranks} ranks"
        )

    @property
    def last_momentum(self) -> float | None:
        """M of the last update; None before the first."""
        return self._momentum_of(self.steps_taken - 1) if self.steps_taken else None

    @property
    def state_key(self) -> str:
        """Made of the pairs, so that several of them get along in one Trainer."""
        return self._generate_state_key(pairs=self.pairs)

    @property
    def needs_horizon(self) -> bool:
        """A constant momentum needs none."""
        return self.base_momentum != self.final_momentum

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._has_count:
            self.momentum = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find pairs and losses, and refuse what could not be averaged."""
        refuse_deepspeed(trainer, type(self).__name__, "may keep parameters outside of their modules")
        self._parameters = find_parameters(pl_module, self.pairs)
        self._students = [local_part(student) for student, _ in self._parameters]
        self._teachers = [local_part(teacher) for _, teacher in self._parameters]
        self._ranks, self._is_checked = trainer.world_size, False
        is_fresh = trainer.global_step == 0 and not self._has_count
        if is_fresh and not self.allow_different_weights:
            self._check_equal_weights(trainer)
        self._check_other_callbacks(trainer, pl_module)
        self._losses = GuardedLosses(trainer, pl_module, self.pairs)
        self._centers = self._losses.centers
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take charge of the losses, for the time of the batch."""
        if self._losses is not None:
            self._losses.take()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update, if an optimizer stepped."""
        if self._losses is not None:
            self._losses.release()
        super().on_train_batch_end(trainer, pl_module, *args)

    @torch.no_grad()
    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average all pairs in one foreach lerp (equal weights stay bitwise equal), and move the centers."""
        update = self.steps_taken - 1
        if not self._is_checked:
            self._check_current(pl_module)
            self._is_checked = True
        get_ema_multi_avg_fn(self._momentum_of(update))(self._teachers, self._students, update)
        if self._losses is not None:
            self._losses.apply_center_updates()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a teacher that would never move, or that is no longer the module's."""
        if self._losses is not None:
            self._losses.release()  # of a batch that was left out
        self.require_steps(trainer, self.steps_taken)
        self._check_current(pl_module)

    def _unhook(self) -> None:
        super()._unhook()
        if self._losses is not None:
            self._losses.release()
            self._losses.forget()
        self._losses = None
        self._parameters, self._students, self._teachers = [], [], []

    def _momentum_of(self, update: int) -> float:
        if self.momentum is not None:
            check_number("TeacherUpdateCallback.momentum", self.momentum, 0, 1)
            return self.momentum
        if self._horizon is None:
            return self.base_momentum
        return cosine_schedule(update, self.base_momentum, self.final_momentum, self._horizon)

    def _check_equal_weights(self, trainer: Trainer) -> None:
        differ = not all(map(torch.equal, self._students, self._teachers))
        if trainer.strategy.reduce_boolean_decision(differ, all=False):
            raise MisconfigurationException(
                f"the run begins with a teacher that differs from the student ({self.pairs}): they are one network at "
                "the start of DINO, teacher = copy.deepcopy(student). If both were loaded from elsewhere, say so with "
                "TeacherUpdateCallback(allow_different_weights=True)"
            )

    def _check_other_callbacks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mine = {id(teacher) for _, teacher in self._parameters}
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, TeacherUpdateCallback) and other is not self:
                theirs = {id(teacher) for _, teacher in find_parameters(pl_module, other.pairs)}
                if not mine.isdisjoint(theirs):
                    raise MisconfigurationException(
                        f"two TeacherUpdateCallbacks, of {self.pairs} and {other.pairs}, would average the same "
                        "parameters of a teacher twice a step: let each have teachers of its own"
                    )

    def _check_current(self, pl_module: LightningModule) -> None:
        now = find_parameters(pl_module, self.pairs)
        if len(now) != len(self._parameters) or any(
            ours is not theirs
            for pair in zip(now, self._parameters, strict=True)
            for ours, theirs in zip(*pair, strict=True)
        ):
            raise MisconfigurationException(
                f"parameters of {self.pairs} were replaced since training began, so that the teacher would no longer "
                "follow: copy new values into them instead, parameter.data.copy_(...)"
            )
