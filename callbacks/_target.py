"""What a schedule sets: an option of the optimizers, or a number of the module or of a callback."""

import difflib
import functools
from collections.abc import Callable
from numbers import Real
from typing import Any, NoReturn, TypeGuard

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from dino_head.losses import DINOLoss

Setters = list[Callable[[float], None]]


def is_number(value: object) -> TypeGuard[Real]:
    """A number of Python or NumPy, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def find_setters(target: str, follows: list[bool], trainer: Trainer, pl_module: LightningModule) -> Setters:
    """Functions that set the target; an error that says what there is where it is not found.

    Args:
        target: see `ScheduleCallback`.
        follows: whether each parameter group follows; what is known stays, new groups are added.
        trainer: whose optimizers and callbacks are searched first.
        pl_module: searched last.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if target.rpartition(".")[2] in ("lr", "initial_lr", "learning_rate"):
        raise MisconfigurationException(
            "ScheduleCallback leaves the learning rate to a scheduler that Lightning steps: return "
            'LambdaLR(optimizer, lambda step: cosine_schedule(...)) with "interval": "step" from '
            "configure_optimizers"
        )
    if any(target in group for group in groups):
        return _of_groups(target, follows, groups)
    return [functools.partial(setattr, owner, name) for owner, name in _owners(target, groups, trainer, pl_module)]


def _of_groups(target: str, follows: list[bool], groups: list[dict[str, Any]]) -> Setters:
    values = [group.get(target, 0.0) for group in groups]
    if not all(map(is_number, values)):
        raise MisconfigurationException(
            f"ScheduleCallback sets numbers, but {target!r} of the optimizer's groups is of type "
            f"{type(values[0]).__name__}: choose another option"
        )
    # Noted once for each group, as a schedule may pass through 0.
    follows += [value != 0 for value in values[len(follows) :]]
    if not any(follows):
        raise MisconfigurationException(
            f"ScheduleCallback found {target!r} in no parameter group with another value than 0, which groups keep: "
            f"give those that are to follow the schedule any other {target!r}"
        )
    chosen = [group for group, is_chosen in zip(groups, follows, strict=True) if is_chosen]
    return [functools.partial(group.__setitem__, target) for group in chosen]


def _owners(
    target: str, groups: list[dict[str, Any]], trainer: Trainer, pl_module: LightningModule
) -> list[tuple[Any, str]]:
    """The objects that have the number, and its name."""
    path, _, name = target.rpartition(".")
    owners: list[Any] = [
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
        if not is_number(value) and not may_be_unset:
            _refuse(target, groups, pl_module, owner, value)
        if isinstance(owner, DINOLoss) and name == "teacher_temp" and owner.warmup_teacher_temp_epochs:
            raise MisconfigurationException(
                f"{target!r} has a warm-up over {owner.warmup_teacher_temp_epochs} epochs of its own: leave the "
                "schedule to one of the two, DINOLoss(..., warmup_teacher_temp_epochs=0)"
            )
    return [(owner, name) for owner in owners]


def _refuse(
    target: str, groups: list[dict[str, Any]], pl_module: LightningModule, owner: object, value: object
) -> NoReturn:
    options = {key for group in groups for key, of in group.items() if is_number(of)} - {"lr", "initial_lr"}
    path, dot, _ = target.rpartition(".")
    names = {path + dot + name for name, of in getattr(owner, "__dict__", {}).items() if is_number(of)}
    close = difflib.get_close_matches(target, [*options, *names], n=1)
    raise MisconfigurationException(
        f"ScheduleCallback found no number {target!r} (there is "
        f"{'nothing' if value is None else f'a {type(value).__name__}'}"
        f"{f'; did you mean {close[0]!r}?' if close else ''}): give an option of the optimizers "
        f"({', '.join(sorted(options))}), the path of a number in {type(pl_module).__name__}, such as "
        '"loss.teacher_temp" of a DINOLoss named loss, or "Callback.attribute" of a callback that the Trainer has'
    )
