"""A callback that updates the teacher, an exponential moving average of the student."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dino_head._arguments import check_number
from dino_head.callbacks._after_step import AfterScheduledStep, find_submodule, local_part, refuse_deepspeed
from dino_head.callbacks._losses import GuardedLosses
from dino_head.schedules import cosine_schedule

PAIRS = 'pairs=(("student", "teacher"),)'  # the argument, as errors show it


class TeacherUpdateCallback(AfterScheduledStep):
    """Updates the teacher and the center once after each optimizer step (arXiv:2104.14294, section 3.1).

        teacher <- m teacher + (1 - m) student,  m: cosine from base_momentum to final_momentum over the run
        center of each DINOLoss:  updated with the logits of all micro-batches of the step

    Parameters are averaged, buffers are not: in train mode, the teacher's batch norm follows the teacher's own batches,
    as in the authors' code. A step that a GradScaler skips updates nothing; the next center update includes its logits.

    The update runs in `on_train_batch_end`, after the optimizer and before ModelCheckpoint, so a checkpoint at any step
    contains the teacher of that step. During training, the callback also checks each value of a DINOLoss and raises
    an error before a NaN reaches the weights. On a GPU, the check waits for the forward pass; in a compiled loss, it
    causes a graph break.

    Args:
        pairs: Names of the (student, teacher) submodules of the LightningModule. Parts of a teacher outside the pairs
            are never updated.
        base_momentum: Momentum m at the first update, in [0, 1].
        final_momentum: Momentum m at the end of the run, in [0, 1].
        total_steps: Number of optimizer steps of the cosine, >= 1; None for the length of the run.
        allow_different_weights: Whether a run may start with a teacher that differs from the student, for weights that
            were trained elsewhere.

    Raises:
        ValueError: An argument is out of range.
        MisconfigurationException: When training starts, if a name does not exist; a pair has different structures or
            weights, or is one object; a teacher requires gradients, is in bf16 or fp16, or is sharded unlike the
            student; the strategy is DeepSpeed; the run has no end or is resumed with another length. During training,
            if parameters were replaced.
        FloatingPointError: The loss is not finite; the message names the side and the likely cause.
    """

    momentum: float | None = None  # of the next update, overrides the cosine; ScheduleCallback may set it

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
            raise ValueError(f'pairs must be (student, teacher) names like (("student", "teacher"),), got {pairs!r}')
        self.pairs = tuple((student, teacher) for student, teacher in pairs)
        self.base_momentum = base_momentum
        self.final_momentum = final_momentum
        self.allow_different_weights = allow_different_weights
        self._parameters: list[tuple[Tensor, Tensor]] = []  # of student and teacher
        self._students: list[Tensor] = []  # this process's parts of them
        self._teachers: list[Tensor] = []
        self._losses: GuardedLosses | None = None
        self._ranks, self._centers = 1, 0
        self._is_checked = False  # whether the first step checked that the parameters are still the module's

    @property
    def receipt(self) -> str | None:
        """The updated modules, the number of updates and the last momentum; None before the first update."""
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
        """Momentum m of the last update; None before the first."""
        return self._momentum_of(self.steps_taken - 1) if self.steps_taken else None

    @property
    def state_key(self) -> str:
        """Built from the pairs, so that a Trainer can have several of these callbacks."""
        return self._generate_state_key(pairs=self.pairs)

    @property
    def needs_horizon(self) -> bool:
        """Whether the momentum changes over the run."""
        return self.base_momentum != self.final_momentum

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of an earlier run, before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._has_count:
            self.momentum = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find pairs and losses, and raise an error if a teacher cannot be averaged."""
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
        """Defer center updates and check the losses during the batch."""
        if self._losses is not None:
            self._losses.guard()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update, if an optimizer stepped."""
        if self._losses is not None:
            self._losses.release()
        super().on_train_batch_end(trainer, pl_module, *args)

    @torch.no_grad()
    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average all pairs in one foreach lerp (equal weights stay bitwise equal), and update the centers."""
        update = self.steps_taken - 1
        if not self._is_checked:
            self._check_current(pl_module)
            self._is_checked = True
        get_ema_multi_avg_fn(self._momentum_of(update))(self._teachers, self._students, update)
        if self._losses is not None:
            self._losses.apply_center_updates()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise an error if no step was seen, or if the teacher's parameters are no longer the module's."""
        if self._losses is not None:
            self._losses.release()  # after a batch that was skipped
        self.require_steps(trainer, self.steps_taken)
        self._check_current(pl_module)

    def _unhook(self) -> None:
        super()._unhook()
        if self._losses is not None:
            self._losses.release()
            self._losses.discard()
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
                f"the run starts with a teacher that differs from the student ({self.pairs}), but DINO starts with two "
                "equal networks: teacher = copy.deepcopy(student). If both were trained elsewhere, allow it with "
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
                        "parameters of a teacher twice a step: give them pairs without a common teacher"
                    )

    def _check_current(self, pl_module: LightningModule) -> None:
        now = find_parameters(pl_module, self.pairs)
        if len(now) != len(self._parameters) or any(
            ours is not theirs
            for pair in zip(now, self._parameters, strict=True)
            for ours, theirs in zip(*pair, strict=True)
        ):
            raise MisconfigurationException(
                f"parameters of {self.pairs} were replaced since training began, so the teacher would no longer follow "
                "the student: copy new values into the old parameters instead, parameter.data.copy_(...)"
            )


def find_parameters(pl_module: LightningModule, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tensor, Tensor]]:
    """(student, teacher) of each parameter of the teachers, without duplicates, after checking that the two match."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for names in pairs:
        student, teacher = (
            {
                name.replace("_orig_mod.", ""): parameter  # torch.compile may have wrapped only one side
                for name, parameter in find_submodule(pl_module, side, PAIRS).named_parameters()
            }
            for side in names
        )
        for name in student | teacher:
            _check_pair(f"{name!r} of {names}", student.get(name), teacher.get(name))
            student_of_teacher, _ = found.setdefault(id(teacher[name]), (student[name], teacher[name]))
            if student_of_teacher is not student[name]:
                raise MisconfigurationException(
                    f"{name!r} of {names} is in another pair as well, with another student: a parameter of a teacher "
                    "can follow only one student"
                )
    return list(found.values())


def _check_pair(which: str, student: Tensor | None, teacher: Tensor | None) -> None:
    remedy = "make the teacher with copy.deepcopy(student)"
    if student is None or teacher is None or student.shape != teacher.shape:
        raise MisconfigurationException(
            f"student and teacher must have equal structure, but {which} is "
            f"{'missing' if student is None else tuple(student.shape)} in the student and "
            f"{'missing' if teacher is None else tuple(teacher.shape)} in the teacher: {remedy}"
        )
    if student is teacher:
        raise MisconfigurationException(f"{which} is one and the same parameter in both: {remedy}")
    if teacher.dtype in (torch.bfloat16, torch.float16):
        raise MisconfigurationException(
            f"{which} is {teacher.dtype} in the teacher, which rounds steps of 1 - momentum away, so it would never "
            "change: keep the parameters in float32, with precision='bf16-mixed' or '16-mixed'"
        )
    if student.dtype != teacher.dtype:
        raise MisconfigurationException(
            f"{which} is {student.dtype} in the student and {teacher.dtype} in the teacher: {remedy}"
        )
    if teacher.requires_grad:
        raise MisconfigurationException(
            f"{which} requires a gradient in the teacher, which only follows: teacher.requires_grad_(False)"
        )
    is_sharded = isinstance(student, DTensor), isinstance(teacher, DTensor)
    if is_sharded[0] != is_sharded[1] or local_part(student).shape != local_part(teacher).shape:
        raise MisconfigurationException(
            f"{which} is sharded in another way in the teacher than in the student: apply fully_shard to both sides "
            "alike, with reshard_after_forward=True, as updates of a teacher that stays gathered would be lost"
        )
