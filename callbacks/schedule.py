"""Any number that changes from step to step: weight decay, temperature, momentum."""

import functools
import math
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from dino_head.callbacks._horizon import OverTheRun
from dino_head.losses import DINOLoss
from dino_head.schedules import cosine_schedule


class ScheduleCallback(OverTheRun):
    """Sets a number before each optimizer step: value = schedule(steps taken so far, steps of the whole run).

        ScheduleCallback("weight_decay", (0.04, 0.4))                      # DINO's cosine, in the optimizers' groups
        ScheduleCallback("loss.teacher_temp", lambda step, total: 0.04 if step < 500 else 0.07)
        ScheduleCallback("TeacherUpdateCallback.momentum", (0.99, 1.0))

    How: in `on_train_batch_start`, so that the forward pass, the optimizer and the teacher's update of one step see one
    value, all micro-batches of an accumulation window the same. (The learning rate stays with a scheduler that
    Lightning steps, `torch.optim.lr_scheduler.LambdaLR` over `cosine_schedule`.)

    Args:
        target: an option of the optimizers' parameter groups, such as "weight_decay" (groups that begin with 0 keep
            it); or the path of a number in the LightningModule, such as "loss.teacher_temp"; or "Callback.attribute"
            with the class of a callback of the Trainer.
        schedule: (step, total_steps) -> value; or (start, end): a cosine from one to the other over the run.
        total_steps: optimizer steps of the whole schedule; None: those of the run.

    Raises:
        ValueError: arguments that are no target, schedule or number of steps.
        MisconfigurationException: when training starts: a target that is not there, the learning rate, a teacher
            temperature that the loss warms up by itself, a run without an end, another length than that of the run
            resumed; during training: a value that is no finite number.
    """

    def __init__(
        self,
        target: str,
        schedule: tuple[float, float] | Callable[[int, int], float],
        *,
        total_steps: int | None = None,
    ) -> None:
        super().__init__(total_steps)
        if not isinstance(target, str) or not target:
            raise ValueError(f'target must be a name such as "weight_decay" or "loss.teacher_temp", got {target!r}')
        if not callable(schedule):
            _check_pair(schedule)
            start, end = schedule
            schedule = functools.partial(_cosine, start=float(start), end=float(end))
        self.target = target
        self.schedule = schedule
        self._groups: list[tuple[int, int]] | None = None  # optimizer and group, where the target is one of theirs
        self._set: Callable[[float], None] | None = None
        self._set_for: int | None = None  # the step whose value is in place
        self._first: float | None = None
        self._last: float | None = None

    @property
    def receipt(self) -> str | None:
        """What was set, from which value to which; None before the first step."""
        if self._first is None or self._last is None:
            return None
        return (
            f"{self.target} from {self._first:.6g} to {self._last:.6g} in {self.steps_taken} of {self._horizon} "
            "optimizer steps"
        )

    @property
    def state_key(self) -> str:
        """Made of the target, so that several of them get along in one Trainer."""
        return self._generate_state_key(target=self.target)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        if not self._has_count:
            self._groups = self._first = self._last = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the target."""
        super().on_train_start(trainer, pl_module)
        self._set, self._set_for = self._find(trainer, pl_module), None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the value of the step to come."""
        if self._set_for == self.steps_taken:
            return
        assert self._set is not None
        assert self._horizon is not None
        value = self.schedule(self.steps_taken, self._horizon)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise MisconfigurationException(
                f"the schedule of {self.target!r} gave {value!r} for step {self.steps_taken} of {self._horizon}: it "
                "must give a finite float"
            )
        self._set(float(value))
        self._set_for, self._last = self.steps_taken, float(value)
        if self._first is None:
            self._first = self._last

    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The count is all; the next batch brings the next value."""

    def state_dict(self) -> dict[str, Any]:
        """The count, the horizon, and what was set where."""
        return {**super().state_dict(), "groups": self._groups, "first": self._first, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up those of a run that goes on."""
        super().load_state_dict(state_dict)
        self._groups, self._first, self._last = (state_dict[key] for key in ("groups", "first", "last"))

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> Callable[[float], None]:
        groups = {
            (i, j): group
            for i, optimizer in enumerate(trainer.optimizers)
            for j, group in enumerate(optimizer.param_groups)
        }
        if any(self.target in group for group in groups.values()):
            if self.target == "lr":
                raise MisconfigurationException(
                    "ScheduleCallback leaves the learning rate to a scheduler that Lightning steps: return "
                    'LambdaLR(optimizer, lambda step: cosine_schedule(...)) with "interval": "step" from '
                    "configure_optimizers"
                )
            if self._groups is None:  # noted once: a schedule may pass through 0
                self._groups = [key for key, group in groups.items() if group.get(self.target)]
            if not self._groups:
                raise MisconfigurationException(
                    f"ScheduleCallback found {self.target!r} in no parameter group with another value than 0, which "
                    f"groups keep: give those that are to follow the schedule any other {self.target!r}"
                )
            return functools.partial(_set_in_groups, [groups[key] for key in self._groups], self.target)
        owner, name = self._owner(trainer, pl_module)
        if isinstance(owner, DINOLoss) and name == "teacher_temp" and owner.warmup_teacher_temp_epochs:
            raise MisconfigurationException(
                f"{self.target!r} has a warm-up over {owner.warmup_teacher_temp_epochs} epochs of its own: leave the "
                "schedule to one of the two, DINOLoss(..., warmup_teacher_temp_epochs=0)"
            )
        return functools.partial(setattr, owner, name)

    def _owner(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Any, str]:
        """The object and the name of its number."""
        path, _, name = self.target.rpartition(".")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if type(callback).__name__ == path and hasattr(callback, name):
                return callback, name
        owner: Any = pl_module
        for part in path.split(".") if path else ():
            owner = getattr(owner, part, None)
        value = getattr(owner, name, None)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            keys = {key for optimizer in trainer.optimizers for key in optimizer.param_groups[0]}
            options = sorted(keys - {"params", "lr", "initial_lr"})
            found = "nothing" if value is None else f"a {type(value).__name__}"
            raise MisconfigurationException(
                f"ScheduleCallback found no number {self.target!r} (there is {found}): give an option of the "
                f"optimizers ({', '.join(options)}), the path of a number in {type(pl_module).__name__} such as "
                '"loss.teacher_temp", or "TeacherUpdateCallback.momentum"'
            )
        return owner, name


def _set_in_groups(groups: list[dict[str, Any]], key: str, value: float) -> None:
    for group in groups:
        group[key] = value


def _cosine(step: int, total_steps: int, *, start: float, end: float) -> float:
    return cosine_schedule(step, start, end, total_steps)


def _check_pair(schedule: object) -> None:
    is_pair = isinstance(schedule, (tuple, list)) and len(schedule) == 2
    if not is_pair or any(isinstance(end, bool) or not isinstance(end, (int, float)) for end in schedule):  # type: ignore[attr-defined]
        raise ValueError(
            f"schedule must be a function of (step, total_steps) or a pair of numbers (start, end), got {schedule!r}"
        )
