"""A callback that schedules any number by optimizer steps: weight decay, temperature, momentum."""

import functools
import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeGuard

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from dino_head.callbacks._after_step import AfterScheduledStep
from dino_head.losses import CenteredLoss
from dino_head.schedules import cosine_schedule

LEARNING_RATE = ("lr", "initial_lr", "learning_rate")


class ScheduleCallback(AfterScheduledStep):
    """Sets a number before each optimizer step: value = schedule(steps taken so far, steps of the whole run).

        ScheduleCallback("weight_decay", (0.04, 0.4))                      # DINO's cosine, in the optimizers' groups
        ScheduleCallback("loss.teacher_temp", lambda step, total: 0.04 if step < 500 else 0.07)
        ScheduleCallback("TeacherUpdateCallback.momentum", (0.99, 1.0))    # of all such callbacks

    The value is set in `on_train_batch_start`, so the forward pass, the optimizer and the teacher's update of one step
    use the same value, as do all micro-batches of an accumulation window. For the learning rate, use a scheduler that
    Lightning steps: `torch.optim.lr_scheduler.LambdaLR` over `cosine_schedule`.

    Args:
        target: Option of the optimizers' parameter groups, such as "weight_decay" (groups that start at 0 stay at 0);
            or path of a number in the LightningModule, such as "loss.teacher_temp"; or "Callback.attribute", with
            the class name of a callback of the Trainer.
        schedule: Function (step, total_steps) -> value, or a pair (start, end) for a cosine between them over the run.
        total_steps: Number of optimizer steps of the whole schedule, >= 1; None for the length of the run.

    Raises:
        ValueError: An argument is not a valid target, schedule or number of steps.
        MisconfigurationException: When training starts, if the target does not exist, is the learning rate or a teacher
            temperature that the loss itself warms up, or if the run has no end or is resumed with another length.
            During training, if a value is not a finite number.
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
        self._follows: list[list[bool]] = []  # for each optimizer's groups, if the target is one of their options
        self._setters: list[Callable[[float], None]] = []
        self._getters: list[Callable[[], float]] = []
        self._set_for: int | None = None  # the step for which the value is set
        self._value: float | None = None  # for that step
        self._first: float | None = None  # read back after the first and the last step
        self._last: float | None = None
        self._changed = 0  # number of steps after which the value differed from the one that was set

    @property
    def receipt(self) -> str | None:
        """The target's values, read back after the first and the last step; None before the first step."""
        if self._first is None or self._last is None:
            return None
        text = f"{self.target} from {self._first:.6g} to {self._last:.6g} in {self.progress()}"
        return f"{text}, changed by other code in {self._changed} of them" if self._changed else text

    @property
    def state_key(self) -> str:
        """Built from the target, so that a Trainer can have several of these callbacks."""
        return self._generate_state_key(target=self.target)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of an earlier run, before a checkpoint is loaded."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not self._has_count:
            self._follows, self._first, self._last, self._changed = [], None, None, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the target."""
        super().on_train_start(trainer, pl_module)
        self._find_target(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the target again, because callbacks that unfreeze a backbone add parameter groups."""
        self._find_target(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the value of the next step."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._set_for == self.steps_taken:
            return
        assert self._horizon is not None
        value = self.schedule(self.steps_taken, self._horizon)
        if not _is_number(value) or not math.isfinite(value):
            raise MisconfigurationException(
                f"the schedule of {self.target!r} returned {value!r} for step {self.steps_taken} of {self._horizon}: "
                "it must return a finite number"
            )
        value = int(value) if isinstance(value, Integral) else float(value)
        for set_value in self._setters:
            set_value(value)
        self._set_for, self._value = self.steps_taken, float(value)

    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the values back, which other code may have changed since."""
        values = [float(get_value()) for get_value in self._getters]
        other = next((value for value in values if value != self._value), self._value)
        self._first, self._last = other if self._first is None else self._first, other
        self._changed += other != self._value

    def state_dict(self) -> dict[str, Any]:
        """The count, the length of the schedule, the groups that follow it, and the values for the receipt."""
        values = {"first": self._first, "last": self._last, "changed": self._changed}
        return {**super().state_dict(), "follows": self._follows, **values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the values of a resumed run."""
        super().load_state_dict(state_dict)
        self._follows, self._first, self._last = (state_dict[key] for key in ("follows", "first", "last"))
        self._changed = state_dict.get("changed", 0)  # not in checkpoints of 0.1

    def _find_target(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path, _, name = self.target.rpartition(".")
        if name in LEARNING_RATE:
            raise MisconfigurationException(
                "ScheduleCallback leaves the learning rate to a scheduler that Lightning steps: return "
                'LambdaLR(optimizer, lambda step: cosine_schedule(...)) with "interval": "step" from '
                "configure_optimizers"
            )
        if any(self.target in group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            groups = self._following_groups(trainer)
            self._setters = [functools.partial(_set_option, *group, self.target) for group in groups]
            self._getters = [functools.partial(_option, *group, self.target) for group in groups]
        else:
            owners = self._owners(trainer, pl_module, path, name)
            self._setters = [functools.partial(setattr, owner, name) for owner in owners]
            self._getters = [functools.partial(getattr, owner, name) for owner in owners]
        self._set_for = None

    def _following_groups(self, trainer: Trainer) -> list[tuple[Optimizer, int]]:
        """Optimizers and indices of groups that do not start at 0; decided once, as a schedule may pass through 0."""
        following: list[tuple[Optimizer, int]] = []
        for index, optimizer in enumerate(trainer.optimizers):
            if index == len(self._follows):
                self._follows.append([])
            follows = self._follows[index]
            for group in optimizer.param_groups[len(follows) :]:
                value = group.get(self.target, 0.0)
                if not _is_number(value):
                    raise MisconfigurationException(
                        f"ScheduleCallback sets numbers, but {self.target!r} of the optimizer's groups is of type "
                        f"{type(value).__name__}: choose another option"
                    )
                follows.append(value != 0)
            following += [(optimizer, number) for number, is_chosen in enumerate(follows) if is_chosen]
        if not following:
            raise MisconfigurationException(
                f"ScheduleCallback found no parameter group with another {self.target!r} than 0, and groups with 0 "
                f"keep it: give any other {self.target!r} to the groups that should follow the schedule"
            )
        return following

    def _owners(self, trainer: Trainer, pl_module: LightningModule, path: str, name: str) -> list[Any]:
        """Objects with the number `name`: the callbacks of class `path`, or the object at this path in the module."""
        owners: list[Any] = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if type(callback).__name__ == path and hasattr(callback, name)
        ] or [_follow_path(pl_module, path)]
        for owner in owners:
            value = getattr(owner, name, None)
            is_unset = isinstance(owner, Callback) and hasattr(owner, name) and value is None
            if not _is_number(value) and not is_unset:
                groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
                options = {key for group in groups for key, option in group.items() if _is_number(option)}
                raise MisconfigurationException(
                    f"ScheduleCallback found no number {self.target!r} (there is "
                    f"{'nothing' if value is None else f'a {type(value).__name__}'}): choose an option of the "
                    f"optimizers ({', '.join(sorted(options.difference(LEARNING_RATE)))}), the path of a number in "
                    f'{type(pl_module).__name__}, such as "loss.teacher_temp" of a DINOLoss named loss, or '
                    '"Callback.attribute" of a callback of the Trainer'
                )
            if isinstance(owner, CenteredLoss) and name == "teacher_temp" and owner.warmup_teacher_temp_epochs:
                raise MisconfigurationException(
                    f"{self.target!r} has a warm-up over {owner.warmup_teacher_temp_epochs} epochs of its own: keep "
                    f"one of the two schedules, {type(owner).__name__}(..., warmup_teacher_temp_epochs=0)"
                )
        return owners


def _option(optimizer: Optimizer, index: int, name: str) -> Any:
    return optimizer.param_groups[index][name]


def _set_option(optimizer: Optimizer, index: int, name: str, value: float) -> None:
    # By index, because optimizer.load_state_dict replaces the groups.
    optimizer.param_groups[index][name] = value


def _follow_path(pl_module: LightningModule, path: str) -> Any:
    owner: Any = pl_module
    for part in path.split(".") if path else ():
        owner = getattr(owner, part, None)
        owner = getattr(owner, "_orig_mod", owner)  # of torch.compile
    return owner


def _is_number(value: object) -> TypeGuard[Real]:
    """Whether the value is a Python or NumPy number, but not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _cosine(step: int, total_steps: int, *, start: float, end: float) -> float:
    return cosine_schedule(step, start, end, total_steps)


def _check_pair(schedule: object) -> None:
    if not isinstance(schedule, (tuple, list)) or len(schedule) != 2 or not all(map(_is_number, schedule)):
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
        raise ValueError(
            f"schedule must be a function of (step, total_steps), but {schedule!r} takes other arguments: {error}"
        ) from None
