"""The losses of a LightningModule in training: center updates are deferred, loss values are checked."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from dino_head.functional._outputs import Outputs, as_outputs, as_token_outputs
from dino_head.losses import CenteredLoss, IBOTPatchLoss, has_processes


def losses_of(pl_module: LightningModule) -> dict[str, CenteredLoss]:
    """Each DINOLoss and IBOTPatchLoss of the module, by name."""
    return {name: module for name, module in pl_module.named_modules() if isinstance(module, CenteredLoss)}


def outputs_of_side(loss: CenteredLoss, out: Any) -> Outputs:
    """The argument of a loss for one side, as `Outputs`: of views, or of masked patches."""
    return as_token_outputs(out) if isinstance(loss, IBOTPatchLoss) else as_outputs(out)


class GuardedLosses:
    """All losses of a LightningModule, with deferred center updates and a check for finite values.

    Each call adds its value, and 0 or NaN for the outputs of both sides, to five numbers of its loss on the device.
    A last row is for the value that training_step returns, which may have other terms. Before backward they are
    reduced over all processes and copied to the host, without waiting. Before the optimizer's step, when backward is
    queued, the host reads them. Under manual optimization, where the optimizer may be one that Lightning does not know,
    the host reads them before backward.

    The losses are guarded only within batches. Copies made between batches are then plain modules, and calls between
    batches do not mix with the sums of an accumulation window.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, pairs: Sequence[tuple[str, str]]) -> None:
        self.trainer, self.pl_module, self.pairs = trainer, pl_module, pairs
        self.losses = losses_of(pl_module)
        self.hooks: list[Any] = []
        self.were_deferred = {name: loss.defer_center_update for name, loss in self.losses.items()}
        self.collected: dict[str, Tensor] = {}  # sums for the centers, between batches
        self.note = torch.compiler.disable(self._note)  # excludes it from a compiled loss
        self.signatures = {loss: inspect.signature(loss.forward) for loss in self.losses.values()}
        self.indices = {loss: index for index, loss in enumerate(self.losses.values())}
        # (number of losses + 1, 5): value; 0 or NaN for the smallest and largest output of teacher and student
        self.sums: Tensor | None = None
        self.copies: list[_HostCopy] = []  # of the sums of this accumulation window's backward passes

    def guard(self) -> None:
        """Defer the updates of the centers, and check the values of the losses."""
        self._return_collected()
        for loss in self.losses.values():
            loss.defer_center_update = True
            self.hooks.append(loss.register_forward_hook(self.note, with_kwargs=True))

    def release(self) -> None:
        """Make the losses plain modules again, and keep the sums that they collected for their centers."""
        if not self.hooks:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        for name, loss in self.losses.items():
            loss.defer_center_update = self.were_deferred[name]
            if loss._collected is not None:
                self.collected[name], loss._collected = loss._collected, None

    def discard(self) -> None:
        """Discard the sums of an interrupted step."""
        self.collected, self.sums, self.copies = {}, None, []

    def moving_centers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The centers that may change, by name, each with the number of rows collected in this process, on the device.

        A batch without masked patches has no rows. The rows of any process change the centers of all.
        """
        return {
            f"{name}.center": (
                loss.center,
                self.collected[name][-1] if name in self.collected else loss.center.new_zeros(()),
            )
            for name, loss in self.losses.items()
            if loss.center is not None and loss.center_momentum < 1
        }

    def apply_center_updates(self) -> None:
        """Update all centers."""
        self._return_collected()
        for loss in self.losses.values():
            loss.apply_center_update()

    def reduce(self, total: Tensor) -> None:
        """Reduce the sums of the calls so far over all processes, and start to copy them to the host.

        All processes have to call it, as they do before backward, with the value of which backward is computed.
        """
        sums = self._zeros(total.device) if self.sums is None else self.sums
        sums[-1, 0] += total.detach().sum()
        if has_processes():
            dist.all_reduce(sums)
        self.copies.append(_HostCopy(sums))
        self.sums = None
        if not self.pl_module.automatic_optimization:
            self.require_finite()

    def require_finite(self) -> None:
        """Raise FloatingPointError if a value of this accumulation window is not finite, in all processes alike."""
        if self.sums is not None:  # of a call without backward, whose logits the center has collected
            self.copies.append(_HostCopy(self.sums))
        copies, self.copies, self.sums = self.copies, [], None
        for copy in copies:
            *of_losses, (total, *_) = copy.read()
            for (name, loss), (value, *extremes) in zip(self.losses.items(), of_losses, strict=True):
                if not math.isfinite(value):
                    which = f" of {name} ({type(loss).__name__})" if len(self.losses) > 1 else ""
                    self._raise_error(which, value, self._explain(loss, extremes))
            if not math.isfinite(total):
                finite = f"the value of {' and '.join(self.losses)} is finite, so that " if self.losses else ""
                self._raise_error(
                    " that training_step returns",
                    total,
                    f"{finite}another term of it is not: check the terms that training_step computes by itself, and "
                    "that it calls the losses as modules, loss(...) and not loss.forward(...)",
                )

    def _raise_error(self, which: str, value: float, reason: str) -> None:
        raise FloatingPointError(
            f"the loss{which} is {value} in epoch {self.trainer.current_epoch}, at optimizer step "
            f"{self.trainer.global_step}: {reason}. No update has used it"
        )

    def _explain(self, loss: CenteredLoss, extremes: list[float]) -> str:
        sides = [self._weights_are_finite(side) for side in zip(*self.pairs, strict=True)]
        return explain(
            (sum(extremes[:2]), sum(extremes[2:])),
            (sides[1], sides[0]),
            center_is_finite=loss.center is None or bool(loss.center.isfinite().all()),
            of_patches=isinstance(loss, IBOTPatchLoss),
        )

    def _zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(len(self.losses) + 1, 5, device=device)

    def _return_collected(self) -> None:
        for name, sums in self.collected.items():
            self.losses[name]._collected = sums
        self.collected = {}

    @torch.no_grad()
    def _note(self, loss: CenteredLoss, arguments: tuple[Any, ...], options: dict[str, Any], value: object) -> None:
        if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
            return
        given = self.signatures[loss].bind(*arguments, **options).arguments
        numbers = [value]
        for side in ("teacher_out", "student_out"):
            rows = outputs_of_side(loss, given[side]).rows if side in given else value
            numbers += (rows if rows.numel() else value).aminmax()  # there may be no masked patches
        sums = torch.stack(numbers).float()
        sums[1:] *= 0  # NaN, if not finite
        self.sums = self._zeros(value.device) if self.sums is None else self.sums
        self.sums[self.indices[loss]] += sums
        if not self.pl_module.automatic_optimization:
            value.register_hook(lambda _: self.require_finite())  # in case of a plain loss.backward()

    def _weights_are_finite(self, modules: tuple[str, ...]) -> bool:
        parameters = [p for name in modules for p in self.pl_module.get_submodule(name).parameters()]
        return all(bool(parameter.isfinite().all()) for parameter in parameters)


class _HostCopy:
    """A copy of a small tensor in main memory, made without waiting for the device."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.is_done = values, None
        if values.device.type == "cuda":
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.is_done = torch.cuda.Event()
            self.is_done.record()

    def read(self) -> list[list[float]]:
        """Wait only for the copy, not for work that was queued after it."""
        if self.is_done is not None:
            self.is_done.synchronize()
        values: list[list[float]] = self.values.tolist()
        return values


def explain(
    outputs: tuple[float, float], weights: tuple[bool, bool], *, center_is_finite: bool, of_patches: bool = False
) -> str:
    """0 or NaN for the outputs of (teacher, student), whether their weights are finite -> cause and remedy."""
    names = ("teacher", "student")
    rows = " for the masked patches" if of_patches else ""
    parts = "mask token, drop path" if of_patches else "views, drop path"
    broken = [name for name, total in zip(names, outputs, strict=True) if not math.isfinite(total)]
    of_weights = [name for name, is_finite in zip(names, weights, strict=True) if not is_finite]
    if of_weights:
        return (
            f"the weights of the {' and the '.join(of_weights)} contain NaN or inf, so an earlier step was too large: "
            "lower the learning rate, warm it up for longer or clip gradients, and resume from the last good checkpoint"
        )
    if len(broken) == 2:
        return (
            f"the outputs of teacher and student{rows} are not finite while their weights are: images or augmentation "
            "contain NaN or inf, or the precision overflows (use bf16 instead of fp16)"
        )
    if not center_is_finite:
        return "the center contains NaN or inf: resume from the last good checkpoint"
    if broken:
        return (
            f"the outputs of the {broken[0]}{rows} are not finite while its weights and the other side are: check the "
            f"parts that only the {broken[0]} uses ({parts}, its own normalisation), or the precision"
        )
    return "the outputs of both sides are finite: logits over temperature overflow, use a higher temperature"
