"""Any number that changes from step to step: weight decay, temperature, momentum."""

import functools
import inspect
import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from dino_head.callbacks._horizon import OverTheRun
from dino_head.callbacks._target import find_setters, is_number
from dino_head.schedules import cosine_schedule


class ScheduleCallback(OverTheRun):
    """Sets a number before each optimizer step: value = schedule(steps taken so far, steps of the whole run).

        ScheduleCallback("weight_decay", (0.04, 0.4))                      # DINO's cosine, in the optimizers' groups
        ScheduleCallback("loss.teacher_temp", lambda step, total: 0.04 if step < 500 else 0.07)
        ScheduleCallback("TeacherUpdateCallback.momentum", (0.99, 1.0))    # of all such callbacks

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
        _check_arguments(schedule)
        self.target = target
        self.schedule = schedule
        self._follows: list[list[bool]] = []  # for each optimizer's groups, where the target is an option of theirs
        self._setters: list[Callable[[float], None]] = []
        self._set_for: int | None = None  # the step whose value is in place
        self._first: float | None = None
        self._last: float | None = None

    @property
    def receipt(self) -> str | None:
        """What was set, from which value to which; None before the first step."""
        if self._first is None or self._last is None:
            return None
        return f"{self.target} from {self._first:.6g} to {self._last:.6g} in {self.progress()}"

    @property
    def state_key(self) -> str:
        """Made of the target, so that several of them get along in one Trainer."""
        return self._generate_state_key(target=self.target)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run, before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._has_count:
            self._follows, self._first, self._last = [], None, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the target."""
        super().on_train_start(trainer, pl_module)
        self._find_target(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find it again: callbacks that unfreeze a backbone add parameter groups."""
        super().on_train_epoch_start(trainer, pl_module)
        self._find_target(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the value of the step to come."""
        if self._set_for == self.steps_taken:
            return
        assert self._horizon is not None
        value = self.schedule(self.steps_taken, self._horizon)
        if not is_number(value) or not math.isfinite(value):
            raise MisconfigurationException(
                f"the schedule of {self.target!r} gave {value!r} for step {self.steps_taken} of {self._horizon}: it "
                "must give a finite number"
            )
        value = int(value) if isinstance(value, Integral) else float(value)
        for put in self._setters:
            put(value)
        self._set_for, self._last = self.steps_taken, float(value)
        if self._first is None:
            self._first = self._last

    def _find_target(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._setters, self._set_for = find_setters(self.target, self._follows, trainer, pl_module), None

    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The count is all; the next batch brings the next value."""

    def state_dict(self) -> dict[str, Any]:
        """The count, the horizon, and what was set where."""
        return {**super().state_dict(), "follows": self._follows, "first": self._first, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up those of a run that goes on."""
        super().load_state_dict(state_dict)
        self._follows, self._first, self._last = (state_dict[key] for key in ("follows", "first", "last"))


def _cosine(step: int, total_steps: int, *, start: float, end: float) -> float:
    return cosine_schedule(step, start, end, total_steps)


def _check_pair(schedule: object) -> None:
    if not isinstance(schedule, (tuple, list)) or len(schedule) != 2 or not all(map(is_number, schedule)):
        raise ValueError(
            f"schedule must be a function of (step, total_steps) or a pair of numbers (start, end), got {schedule!r}"
        )


def _check_arguments(schedule: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(schedule)
    except ValueError:  # of a function that is not written in Python
        return
    try:
        signature.bind(0, 1)
    except TypeError as error:
        raise ValueError(f"schedule must be a function of (step, total_steps), got another one: {error}") from None
