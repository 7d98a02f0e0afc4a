"""The objectives of a LightningModule while it trains: their centers wait for the step, their values are looked at."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from dino_head.callbacks._access import find_submodule
from dino_head.callbacks._pairs import PAIRS
from dino_head.functional._outputs import as_outputs
from dino_head.losses import DINOLoss


class GuardedLosses:
    """All DINOLoss modules of a LightningModule.

    They are taken in charge for the time of a batch alone, so that copies made between batches are plain modules, and
    calls between batches do not mix with what a window of accumulation has added up.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, pairs: Sequence[tuple[str, str]]) -> None:
        self.trainer, self.pl_module, self.pairs = trainer, pl_module, pairs
        self.losses = [module for module in pl_module.modules() if isinstance(module, DINOLoss)]
        self.hooks: list[Any] = []
        self.were_deferred = [loss.defer_center_update for loss in self.losses]
        self.collected: list[Tensor | None] = [None] * len(self.losses)  # between batches

    @property
    def centers(self) -> int:
        """How many of them have a center."""
        return sum(loss.center is not None for loss in self.losses)

    def take(self) -> None:
        """Let centers wait, and look at values."""
        self._give_back()
        for loss in self.losses:
            loss.defer_center_update = True
            self.hooks.append(loss.register_forward_hook(self._check_finite, with_kwargs=True))

    def release(self) -> None:
        """Leave the losses as they were, and keep what they added up for the center."""
        if not self.hooks:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        for index, (loss, was_deferred) in enumerate(zip(self.losses, self.were_deferred, strict=True)):
            loss.defer_center_update = was_deferred
            self.collected[index], loss._collected = loss._collected, None

    def forget(self) -> None:
        """Drop what was added up, of a step that was interrupted."""
        self.collected = [None] * len(self.losses)

    def apply_center_updates(self) -> None:
        """Move all centers."""
        self._give_back()
        for loss in self.losses:
            loss.apply_center_update()

    def _give_back(self) -> None:
        for index, loss in enumerate(self.losses):
            if self.collected[index] is not None:  # another callback may have had it in charge
                loss._collected, self.collected[index] = self.collected[index], None

    def _check_finite(self, loss: DINOLoss, arguments: tuple[Any, ...], options: dict[str, Any], value: object) -> None:
        if not loss.training or not isinstance(value, Tensor) or value.ndim or math.isfinite(value.item()):
            return
        given = inspect.signature(loss.forward).bind(*arguments, **options).arguments
        outputs = given["teacher_out"], given["student_out"]
        students, teachers = (
            [find_submodule(self.pl_module, name, PAIRS) for name in side] for side in zip(*self.pairs, strict=True)
        )
        raise FloatingPointError(
            f"the loss is {value.item()} in epoch {self.trainer.current_epoch}, at optimizer step "
            f"{self.trainer.global_step}: {explain(outputs, (teachers, students), loss.center)}. Nothing was "
            "updated in this step"
        )


@torch.no_grad()
def explain(outputs: tuple[Any, Any], sides: tuple[list[nn.Module], list[nn.Module]], center: Tensor | None) -> str:
    """Outputs and modules of (teacher, student) -> which side is not finite, the likely cause and the remedy."""
    named = zip(("teacher", "student"), map(as_outputs, outputs), strict=True)
    broken = [name for name, out in named if not out.is_finite()]
    weights = [
        name
        for name, modules in zip(("teacher", "student"), sides, strict=True)
        if not all(parameter.isfinite().all() for module in modules for parameter in module.parameters())
    ]
    if weights:
        return (
            f"the weights of the {' and the '.join(weights)} hold NaN or inf, so an earlier step was too large: lower "
            "the learning rate, warm it up for longer or clip gradients, and go on from the last good checkpoint"
        )
    if len(broken) == 2:
        return (
            "the outputs of teacher and student are not finite while their weights are: images or augmentation hold "
            "NaN or inf, or the precision overflows (use bf16 in place of fp16)"
        )
    if center is not None and not center.isfinite().all():
        return "the center holds NaN or inf: go on from the last good checkpoint"
    if broken:
        return (
            f"the outputs of the {broken[0]} are not finite while its weights and the other side are: look at what "
            f"only the {broken[0]} sees (views, drop path, its own normalisation), or at the precision"
        )
    return "the outputs of both sides are finite: logits over temperature overflow, use a higher temperature"
