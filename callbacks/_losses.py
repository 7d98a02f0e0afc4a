"""The DINOLoss modules of a LightningModule in training: center updates are deferred, loss values are checked."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from dino_head.functional._outputs import as_outputs
from dino_head.losses import DINOLoss


class GuardedLosses:
    """All DINOLoss modules of a LightningModule, with deferred center updates and a check for finite values.

    They are guarded only within batches. Copies made between batches are then plain modules, and calls between batches
    do not mix with the sums of an accumulation window.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, pairs: Sequence[tuple[str, str]]) -> None:
        self.trainer, self.pl_module, self.pairs = trainer, pl_module, pairs
        self.losses = [module for module in pl_module.modules() if isinstance(module, DINOLoss)]
        self.hooks: list[Any] = []
        self.were_deferred = [loss.defer_center_update for loss in self.losses]
        self.collected: list[Tensor | None] = [None] * len(self.losses)  # sums for the centers, between batches

    @property
    def centers(self) -> int:
        """Number of losses that have a center."""
        return sum(loss.center is not None for loss in self.losses)

    def guard(self) -> None:
        """Defer the updates of the centers, and check the values of the losses."""
        self._return_collected()
        for loss in self.losses:
            loss.defer_center_update = True
            self.hooks.append(loss.register_forward_hook(self._check_finite, with_kwargs=True))

    def release(self) -> None:
        """Make the losses plain modules again, and keep the sums that they collected for their centers."""
        if not self.hooks:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        for index, (loss, was_deferred) in enumerate(zip(self.losses, self.were_deferred, strict=True)):
            loss.defer_center_update = was_deferred
            self.collected[index], loss._collected = loss._collected, None

    def discard(self) -> None:
        """Discard the sums of an interrupted step."""
        self.collected = [None] * len(self.losses)

    def apply_center_updates(self) -> None:
        """Update all centers."""
        self._return_collected()
        for loss in self.losses:
            loss.apply_center_update()

    def _return_collected(self) -> None:
        for index, loss in enumerate(self.losses):
            if self.collected[index] is not None:  # None where another callback guarded the loss
                loss._collected, self.collected[index] = self.collected[index], None

    def _check_finite(self, loss: DINOLoss, arguments: tuple[Any, ...], options: dict[str, Any], value: object) -> None:
        if not loss.training or not isinstance(value, Tensor) or value.ndim or math.isfinite(value.item()):
            return
        given = inspect.signature(loss.forward).bind(*arguments, **options).arguments
        outputs = given["teacher_out"], given["student_out"]
        students, teachers = (
            [self.pl_module.get_submodule(name) for name in side] for side in zip(*self.pairs, strict=True)
        )
        raise FloatingPointError(
            f"the loss is {value.item()} in epoch {self.trainer.current_epoch}, at optimizer step "
            f"{self.trainer.global_step}: {explain(outputs, (teachers, students), loss.center)}. Nothing was "
            "updated in this step"
        )


@torch.no_grad()
def explain(outputs: tuple[Any, Any], sides: tuple[list[nn.Module], list[nn.Module]], center: Tensor | None) -> str:
    """Outputs and modules of (teacher, student) -> the side that is not finite, the likely cause and the remedy."""
    named = zip(("teacher", "student"), map(as_outputs, outputs), strict=True)
    broken = [name for name, out in named if not out.is_finite()]
    weights = [
        name
        for name, modules in zip(("teacher", "student"), sides, strict=True)
        if not all(parameter.isfinite().all() for module in modules for parameter in module.parameters())
    ]
    if weights:
        return (
            f"the weights of the {' and the '.join(weights)} contain NaN or inf, so an earlier step was too large: "
            "lower the learning rate, warm it up for longer or clip gradients, and resume from the last good checkpoint"
        )
    if len(broken) == 2:
        return (
            "the outputs of teacher and student are not finite while their weights are: images or augmentation "
            "contain NaN or inf, or the precision overflows (use bf16 instead of fp16)"
        )
    if center is not None and not center.isfinite().all():
        return "the center contains NaN or inf: resume from the last good checkpoint"
    if broken:
        return (
            f"the outputs of the {broken[0]} are not finite while its weights and the other side are: check the parts "
            f"that only the {broken[0]} uses (views, drop path, its own normalisation), or the precision"
        )
    return "the outputs of both sides are finite: logits over temperature overflow, use a higher temperature"
