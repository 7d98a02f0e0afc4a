"""A callback that updates the teacher, an exponential moving average of the student."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dino_head._arguments import check_number
from dino_head.callbacks._after_step import AfterScheduledStep, refuse_deepspeed
from dino_head.callbacks._checks.layout import (
    PAIRS,
    Pairs,
    find_submodule,
    fingerprint,
    local_part,
    read,
    without_compile,
)
from dino_head.callbacks._checks.losses import GuardedLosses
from dino_head.schedules import cosine_schedule

Weights = list[tuple[Tensor, Tensor]]  # parameters of student and teacher
COPY = "make the teacher with copy.deepcopy(student)"


class TeacherUpdateCallback(AfterScheduledStep):
    """Updates the teacher and the centers once after each optimizer step (arXiv:2104.14294, section 3.1).

        teacher <- m teacher + (1 - m) student,  m: cosine from base_momentum to final_momentum over the run
        center of each loss:  updated with the logits of all micro-batches of the step

    Parameters are averaged, buffers are not: in train mode, the teacher's batch norm follows the teacher's own batches,
    as in the authors' code. A step that a GradScaler skips updates nothing; the next center update includes its logits.
    A frozen parameter that both sides share is skipped, and a student may have submodules of its own, such as a
    predictor.

    The update runs in `on_train_batch_end`, after the optimizer and before ModelCheckpoint, so a checkpoint at any step
    contains the teacher of that step. During training, the callback also checks each value of a DINOLoss or
    IBOTPatchLoss and of the whole loss, and raises an error on all processes before a NaN on one of them reaches the
    weights. The host reads the values before the optimizer's step, when backward is queued on the device.

    At the first three updates, the last one of each epoch and the last of the run, the weights are compared with those
    before; `receipt` has the result. Updates with momentum 1, or of a teacher that equals the student, do not count.

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
        self._weights: list[Weights] = []  # of each pair
        self._students: list[Tensor] = []  # this process's parts of them
        self._teachers: list[Tensor] = []
        self._losses: GuardedLosses | None = None
        self._is_checked = False  # whether the first step checked that the parameters are still the module's
        # For the receipt, by name: number of looks at which it changed, and at which it should have changed.
        self._seen: dict[str, list[int]] = {}
        self._world, self._missed = 1, 0  # processes, and those in which something did not change at a look
        self._other_parts_before = "not checked"

    @property
    def receipt(self) -> str | None:
        """The observed changes, the number of updates and the last momentum; None before the first update."""
        if not self.steps_taken:
            return None
        looks = [f"{name} at {seen} of {counted}" for name, (seen, counted) in self._seen.items()]
        first, others = "".join(looks[:1]).replace(" at ", " seen to change at ", 1), looks[1:]
        seen = f"{', '.join([f'{first} looks', *others])}, on {self._world - self._missed} of {self._world} ranks"
        return (
            f"{seen if looks else 'no look'}, in {self.progress()}, last with momentum {self.last_momentum:.6g}; "
            f"teacher parts left behind: {self._other_parts}"
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

    @property
    def updated_pairs(self) -> Pairs:
        """All of its pairs."""
        return self.pairs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of an earlier run, before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._has_count:
            self.momentum, self._seen, self._missed = None, {}, 0
            self._other_parts_before = "not checked"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find pairs and losses, and raise an error if a teacher cannot be averaged."""
        refuse_deepspeed(trainer, type(self).__name__, "may keep parameters outside of their modules")
        self._weights = find_weights(pl_module, self.pairs)
        self._students = [local_part(student) for weights in self._weights for student, _ in weights]
        self._teachers = [local_part(teacher) for weights in self._weights for _, teacher in weights]
        self._world, self._is_checked = trainer.world_size, False
        is_fresh = trainer.global_step == 0 and not self._has_count
        if is_fresh and not self.allow_different_weights:
            self._check_equal_weights()
        self._check_other_callbacks(trainer, pl_module)
        self._losses = GuardedLosses(trainer, pl_module, self.pairs)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Defer center updates and check the losses during the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._losses is not None:
            self._losses.guard()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Start to copy the values of the losses, and of `loss`, to the host."""
        if self._losses is not None:
            self._losses.reduce(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Raise an error if a value of the losses is not finite."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._losses is not None:
            self._losses.require_finite()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update, if an optimizer stepped."""
        if self._losses is not None:
            self._losses.release()
        super().on_train_batch_end(trainer, pl_module, *args)

    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average all pairs in one foreach lerp (equal weights stay bitwise equal), and update the centers."""
        if not self._is_checked:
            self._check_current(pl_module)
            self._is_checked = True
        is_last = trainer.is_last_batch or trainer.global_step == trainer.max_steps or trainer.should_stop
        if self.steps_taken <= 3 or is_last:
            self._look_at_update()
        else:
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        update = self.steps_taken - 1
        get_ema_multi_avg_fn(self._momentum_of(update))(self._teachers, self._students, update)
        if self._losses is not None:
            self._losses.apply_center_updates()

    @torch.no_grad()
    def _look_at_update(self) -> None:
        """Update, and count the teachers and centers that changed, of those that should."""
        centers = {} if self._losses is None else self._losses.moving_centers()
        centers_before = [center.clone() for center, _ in centers.values()]
        before = fingerprint(self._teachers)
        should_change = fingerprint(self._students) != before
        if self._momentum_of(self.steps_taken - 1) == 1:
            should_change = torch.zeros_like(should_change)
        self._update()
        changed = fingerprint(self._teachers) != before
        sizes = [len(weights) for weights in self._weights]
        flags = [
            flag
            for expected, seen in zip(should_change.split(sizes), changed.split(sizes), strict=True)
            for flag in (expected.any(), (expected & seen).any())
        ]
        for (center, rows), center_before in zip(centers.values(), centers_before, strict=True):
            flags += [rows > 0, (center != center_before).any() & center.isfinite().all()]
        processes = read(torch.stack(flags))
        names = [teacher for _, teacher in self.pairs] + list(centers)
        for name, expected, seen in zip(names, processes[::2], processes[1::2], strict=True):
            counts = self._seen.setdefault(name, [0, 0])
            if expected:
                expected = self._world if name in centers else expected  # the rows of any process change all centers
                counts[0] += seen == expected
                counts[1] += 1
                self._missed = max(self._missed, int(expected - seen))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise an error if no step was seen, or if the teacher's parameters are no longer the module's."""
        if self._losses is not None:
            self._losses.release()  # after a batch that was skipped
        self.require_steps(trainer, self.steps_taken)
        self._check_current(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The count of steps, the length of the schedule, and the results of the looks."""
        looks = {"seen": self._seen, "missed": self._missed, "other_parts": self._other_parts}
        return {**super().state_dict(), **looks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the counts of a resumed run."""
        super().load_state_dict(state_dict)
        if "seen" in state_dict:  # not in checkpoints of 0.1
            self._seen, self._missed = state_dict["seen"], state_dict["missed"]
            self._other_parts_before = state_dict["other_parts"]

    @property
    def _other_parts(self) -> str:
        """Outcome of the check of the teacher's parts outside the pairs, in this run or before it was resumed."""
        outcome = self.outcome if self.teacher_check is None else self.teacher_check.outcome
        return self._other_parts_before if outcome == "not checked" else outcome

    def _unhook(self) -> None:
        super()._unhook()
        if self._losses is not None:
            self._losses.release()
            self._losses.discard()
        self._losses = None
        self._weights, self._students, self._teachers = [], [], []

    def _momentum_of(self, update: int) -> float:
        if self.momentum is not None:
            check_number("TeacherUpdateCallback.momentum", self.momentum, 0, 1)
            return self.momentum
        if self._horizon is None:
            return self.base_momentum
        return cosine_schedule(update, self.base_momentum, self.final_momentum, self._horizon)

    def _check_equal_weights(self) -> None:
        if any(read((fingerprint(self._students) != fingerprint(self._teachers)).any()[None])):
            raise MisconfigurationException(
                f"the run starts with a teacher that differs from the student {self.pairs}, but DINO starts with two "
                "equal networks: teacher = copy.deepcopy(student). If both were trained elsewhere, add "
                "allow_different_weights=True to the callback's arguments"
            )

    def _check_other_callbacks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mine = {id(teacher) for weights in self._weights for _, teacher in weights}
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, TeacherUpdateCallback) and other is not self:
                theirs = {id(teacher) for weights in find_weights(pl_module, other.pairs) for _, teacher in weights}
                if not mine.isdisjoint(theirs):
                    raise MisconfigurationException(
                        f"two TeacherUpdateCallbacks, of {self.pairs} and {other.pairs}, would average the same "
                        "parameters of a teacher twice a step: give them pairs without a common teacher"
                    )

    def _check_current(self, pl_module: LightningModule) -> None:
        now, before = (
            [(id(student), id(teacher)) for of_pair in weights for student, teacher in of_pair]
            for weights in (find_weights(pl_module, self.pairs), self._weights)
        )
        if now != before:
            raise MisconfigurationException(
                f"parameters of {self.pairs} were replaced since training began, so the teacher would no longer follow "
                "the student: copy new values into the old parameters instead, parameter.data.copy_(...)"
            )


def find_weights(pl_module: LightningModule, pairs: Pairs) -> list[Weights]:
    """For each pair, (student, teacher) of the teacher's parameters, after checking that the two match.

    A parameter that several modules share is only in the first pair, a frozen one that both sides share in none.
    """
    found: dict[int, Tensor] = {}  # parameters of the students, by their teachers
    of_pairs: list[Weights] = []
    for names in pairs:
        sides = [find_submodule(pl_module, name, PAIRS) for name in names]
        student, teacher = (
            {without_compile(name): parameter for name, parameter in side.named_parameters()} for side in sides
        )
        _check_structure(names, *sides)
        of_pairs.append([])
        for name, follower in teacher.items():
            if student[name] is follower and not follower.requires_grad:
                continue
            _check_pair(f"{name!r} of {names}", student[name], follower)
            if id(follower) not in found:
                found[id(follower)] = student[name]
                of_pairs[-1].append((student[name], follower))
            elif found[id(follower)] is not student[name]:
                raise MisconfigurationException(
                    f"{name!r} of {names} is in another pair as well, with another student: a parameter of a teacher "
                    "can follow only one student"
                )
    if not found:
        raise MisconfigurationException(
            f"the teachers of {tuple(pairs)} have no parameters of their own to update: {COPY}, and name both sides "
            f"with {PAIRS}"
        )
    return of_pairs


def _check_structure(names: tuple[str, str], student: nn.Module, teacher: nn.Module) -> None:
    """Raise an error unless each parameter of the teacher, and of its modules in the student, has a counterpart."""
    ours, theirs = (
        {without_compile(name): parameter.shape for name, parameter in side.named_parameters()}
        for side in (student, teacher)
    )
    shared = {without_compile(name) for name, _ in teacher.named_modules()}
    for name in ours | theirs:
        is_of_student_alone = name not in theirs and name.rpartition(".")[0] not in shared  # such as a predictor's
        if ours.get(name) != theirs.get(name) and not is_of_student_alone:
            raise MisconfigurationException(
                f"student and teacher must have equal structure, but {name!r} of {names} is "
                f"{tuple(ours[name]) if name in ours else 'missing'} in the student and "
                f"{tuple(theirs[name]) if name in theirs else 'missing'} in the teacher: {COPY}"
            )


def _check_pair(which: str, student: Tensor, teacher: Tensor) -> None:
    if student is teacher:
        raise MisconfigurationException(f"{which} is one and the same parameter in both: {COPY}")
    if teacher.dtype in (torch.bfloat16, torch.float16):
        raise MisconfigurationException(
            f"{which} is {teacher.dtype} in the teacher, which rounds steps of 1 - momentum away, so it would never "
            "change: keep the parameters in float32, with precision='bf16-mixed' or '16-mixed'"
        )
    if student.dtype != teacher.dtype:
        raise MisconfigurationException(
            f"{which} is {student.dtype} in the student and {teacher.dtype} in the teacher: {COPY}"
        )
    if teacher.requires_grad:
        raise MisconfigurationException(
            f"{which} requires a gradient in the teacher, which only follows: call requires_grad_(False) on "
            "the teacher, or write the pair as (student, teacher)"
        )
    is_sharded = isinstance(student, DTensor), isinstance(teacher, DTensor)
    if is_sharded[0] != is_sharded[1] or local_part(student).shape != local_part(teacher).shape:
        raise MisconfigurationException(
            f"{which} is sharded in another way in the teacher than in the student: apply fully_shard to both sides "
            "alike, with reshard_after_forward=True, as updates of a teacher that stays gathered would be lost"
        )
