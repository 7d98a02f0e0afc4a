"""Any number that changes from step to step: weight decay, temperature, momentum."""

import difflib
import functools
import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeGuard

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from dino_head.callbacks._horizon import OverTheRun
from dino_head.losses import DINOLoss
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
        self._follows: list[bool] = []  # for each parameter group, where the target is an option of theirs
        self._setters: list[Callable[[float], None]] = []
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
        if stage == "fit" and not self._has_count:
            self._follows, self._first, self._last = [], None, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the target."""
        super().on_train_start(trainer, pl_module)
        self._find(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find it again: callbacks that unfreeze a backbone add parameter groups."""
        super().on_train_epoch_start(trainer, pl_module)
        self._find(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the value of the step to come."""
        if self._set_for == self.steps_taken:
            return
        assert self._horizon is not None
        value = self.schedule(self.steps_taken, self._horizon)
        if not _is_number(value) or not math.isfinite(value):
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

    def after_optimizer_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The count is all; the next batch brings the next value."""

    def state_dict(self) -> dict[str, Any]:
        """The count, the horizon, and what was set where."""
        return {**super().state_dict(), "follows": self._follows, "first": self._first, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up those of a run that goes on."""
        super().load_state_dict(state_dict)
        self._follows, self._first, self._last = (state_dict[key] for key in ("follows", "first", "last"))

    def _find(self, trainer: Trainer, pl_module: LightningModule) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._set_for = None
        if self.target.rpartition(".")[2] in ("lr", "initial_lr", "learning_rate"):
            raise MisconfigurationException(
                "ScheduleCallback leaves the learning rate to a scheduler that Lightning steps: return "
                'LambdaLR(optimizer, lambda step: cosine_schedule(...)) with "interval": "step" from '
                "configure_optimizers"
            )
        if any(self.target in group for group in groups):
            self._setters = self._find_groups(groups)
        else:
            self._setters = [
                functools.partial(setattr, owner, name) for owner, name in self._owners(trainer, pl_module)
            ]

    def _find_groups(self, groups: list[dict[str, Any]]) -> list[Callable[[float], None]]:
        values = [group.get(self.target, 0.0) for group in groups]
        if not all(map(_is_number, values)):
            raise MisconfigurationException(
                f"ScheduleCallback sets numbers, but {self.target!r} of the optimizer's groups is of type "
                f"{type(values[0]).__name__}: choose another option"
            )
        # Noted once for each group, as a schedule may pass through 0.
        self._follows += [value != 0 for value in values[len(self._follows) :]]
        if not any(self._follows):
            raise MisconfigurationException(
                f"ScheduleCallback found {self.target!r} in no parameter group with another value than 0, which groups "
                f"keep: give those that are to follow the schedule any other {self.target!r}"
            )
        chosen = [group for group, follows in zip(groups, self._follows, strict=True) if follows]
        return [functools.partial(group.__setitem__, self.target) for group in chosen]

    def _owners(self, trainer: Trainer, pl_module: LightningModule) -> list[tuple[Any, str]]:
        """The objects that have the number, and its name."""
        path, _, name = self.target.rpartition(".")
        owners = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if type(callback).__name__ == path and hasattr(callback, name)
        ]
        if not owners:
            owner: Any = pl_module
            for part in path.split(".") if path else ():
                owner = getattr(owner, part, None)
                owner = getattr(owner, "_orig_mod", owner)  # of torch.compile
            owners = [owner]
        for owner in owners:
            value = getattr(owner, name, None)
            may_be_unset = isinstance(owner, Callback) and hasattr(owner, name) and value is None
            if not _is_number(value) and not may_be_unset:
                self._refuse(trainer, pl_module, owner, value)
            if isinstance(owner, DINOLoss) and name == "teacher_temp" and owner.warmup_teacher_temp_epochs:
                raise MisconfigurationException(
                    f"{self.target!r} has a warm-up over {owner.warmup_teacher_temp_epochs} epochs of its own: leave "
                    "the schedule to one of the two, DINOLoss(..., warmup_teacher_temp_epochs=0)"
                )
        return [(owner, name) for owner in owners]

    def _refuse(self, trainer: Trainer, pl_module: LightningModule, owner: object, value: object) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        options = {key for group in groups for key, of in group.items() if _is_number(of)} - {"lr", "initial_lr"}
        path, dot, _ = self.target.rpartition(".")
        names = {path + dot + name for name, of in getattr(owner, "__dict__", {}).items() if _is_number(of)}
        close = difflib.get_close_matches(self.target, [*options, *names], n=1)
        raise MisconfigurationException(
            f"ScheduleCallback found no number {self.target!r} (there is "
            f"{'nothing' if value is None else f'a {type(value).__name__}'}"
            f"{f'; did you mean {close[0]!r}?' if close else ''}): give an option of the optimizers "
            f"({', '.join(sorted(options))}), the path of a number in {type(pl_module).__name__}, such as "
            '"loss.teacher_temp" of a DINOLoss named loss, or "Callback.attribute" of a callback that the Trainer has'
        )


def _is_number(value: object) -> TypeGuard[Real]:
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
        inspect.signature(schedule).bind(0, 1)
    except TypeError as error:
        raise ValueError(f"schedule must be a function of (step, total_steps), got another one: {error}") from None
