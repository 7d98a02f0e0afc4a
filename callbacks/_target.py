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


def find_setters(target: str, follows: list[list[bool]], trainer: Trainer, pl_module: LightningModule) -> Setters:
    """Functions that set the target; an error that says what there is where it is not found.

    Args:
        target: see `ScheduleCallback`.
        follows: for each optimizer, whether each of its groups follows; what is known stays, new groups are added.
        trainer: whose optimizers and callbacks are searched first.
        pl_module: searched last.
    """
    if target.rpartition(".")[2] in ("lr", "initial_lr", "learning_rate"):
        raise MisconfigurationException(
            "ScheduleCallback leaves the learning rate to a scheduler that Lightning steps: return "
            'LambdaLR(optimizer, lambda step: cosine_schedule(...)) with "interval": "step" from '
            "configure_optimizers"
        )
    groups = [optimizer.param_groups for optimizer in trainer.optimizers]
    if any(target in group for of_optimizer in groups for group in of_optimizer):
        follows += [[] for _ in groups[len(follows) :]]
        chosen = [group for of, known in zip(groups, follows, strict=True) for group in _following(target, known, of)]
        if not chosen:
            raise MisconfigurationException(
                f"ScheduleCallback found {target!r} in no parameter group with another value than 0, which groups "
                f"keep: give those that are to follow the schedule any other {target!r}"
            )
        return [functools.partial(group.__setitem__, target) for group in chosen]
    options = {key for of in groups for group in of for key, value in group.items() if is_number(value)}
    owners = _owners(target, options - {"lr", "initial_lr"}, trainer, pl_module)
    return [functools.partial(setattr, owner, name) for owner, name in owners]


def _following(target: str, follows: list[bool], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of an optimizer that follow: noted once for each, as a schedule may pass through 0."""
    for group in groups[len(follows) :]:
        value = group.get(target, 0.0)
        if not is_number(value):
            raise MisconfigurationException(
                f"ScheduleCallback sets numbers, but {target!r} of the optimizer's groups is of type "
                f"{type(value).__name__}: choose another option"
            )
        follows.append(value != 0)
    return [group for group, is_chosen in zip(groups, follows, strict=True) if is_chosen]


def _owners(target: str, options: set[str], trainer: Trainer, pl_module: LightningModule) -> list[tuple[Any, str]]:
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
            _refuse(target, options, pl_module, owner, value)
        if isinstance(owner, DINOLoss) and name == "teacher_temp" and owner.warmup_teacher_temp_epochs:
            raise MisconfigurationException(
                f"{target!r} has a warm-up over {owner.warmup_teacher_temp_epochs} epochs of its own: leave the "
                "schedule to one of the two, DINOLoss(..., warmup_teacher_temp_epochs=0)"
            )
    return [(owner, name) for owner in owners]


def _refuse(target: str, options: set[str], pl_module: LightningModule, owner: object, value: object) -> NoReturn:
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
