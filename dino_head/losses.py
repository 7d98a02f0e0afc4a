"""The objectives as modules that keep a center.

Sizes: B samples, T teacher views, S student views, V views of all images, N patches of a view, M masked patches,
K prototypes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_head._arguments import check_integer, check_number
from dino_head._keys import add_remedy
from dino_head.functional import dino_loss, ibot_patch_loss, sinkhorn_center
from dino_head.functional._outputs import Logits, Outputs, as_outputs, as_token_outputs
from dino_head.functional.ibot import Tokens, patch_weights
from dino_head.schedules import teacher_temperature


class CenteredLoss(nn.Module):
    """Base class of the objectives: the teacher's centering and its temperature.

    In training mode each call of `forward` updates the center `c` after computing the loss, with the mean of the
    teacher's logits over the rows (samples of all views, or masked patches) of all processes:

        c <- m c + (1 - m) mean of the teacher's logits

    In evaluation mode the center stays unchanged. It is float32 whatever the model's precision, and part of the state
    dict. With `defer_center_update = True` a call only adds its logits to a sum, and `apply_center_update()` updates
    the center with everything added since the last update: once per optimizer step under gradient accumulation.

    `centering="sinkhorn"` has no center. It spreads each batch evenly over the prototypes (`sinkhorn_center`), across
    the rows of all processes, so every process has to call the loss, even in evaluation mode.

    The arguments are those of `DINOLoss`.
    """

    center: Tensor | None  # (1, 1, K); None: sinkhorn
    defer_center_update = False

    def __init__(
        self,
        output_dim: int = 4096,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.07,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        *,
        centering: str = "mean",
    ) -> None:
        super().__init__()
        check_integer("output_dim", output_dim, 1)
        check_integer("warmup_teacher_temp_epochs", warmup_teacher_temp_epochs, 0)
        temperatures = {
            "warmup_teacher_temp": warmup_teacher_temp,
            "teacher_temp": teacher_temp,
            "student_temp": student_temp,
        }
        for name, temperature in temperatures.items():
            check_number(name, temperature, 0, float("inf"), exclude_minimum=True)
        check_number("center_momentum", center_momentum, 0, 1)
        if centering not in ("mean", "sinkhorn"):
            raise ValueError(f'centering must be "mean" or "sinkhorn", got {centering!r}')
        self.output_dim = output_dim
        self.warmup_teacher_temp = warmup_teacher_temp
        self.teacher_temp = teacher_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        has_center = centering == "mean"
        center = torch.zeros(1, 1, output_dim, dtype=torch.float32)  # whatever the default type
        self.register_buffer("center", center if has_center else None)
        # (K + 1,): the sum of logits, then their number, so that one reduction covers both. It is not a buffer,
        # because DDP would overwrite it with the one of the first process.
        self._collected: Tensor | None = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the center to 0, for a loss that was made on the meta device."""
        if self.center is not None:
            self.center.zero_()

    @property
    def centering(self) -> str:
        """Centering of the teacher, "mean" or "sinkhorn"; it is fixed when the loss is made."""
        return "sinkhorn" if self.center is None else "mean"

    def temperature(self, epoch: int | None = None) -> float:
        """Temperature of the teacher in an epoch; None for the final one."""
        return teacher_temperature(epoch, self.warmup_teacher_temp, self.teacher_temp, self.warmup_teacher_temp_epochs)

    def center_for(self, teacher_out: Logits, teacher_temp: float) -> Tensor:
        """Center to subtract from these logits of the teacher; with Sinkhorn, computed from this batch, (K,)."""
        if self.center is not None:
            return self.center
        return sinkhorn_center(teacher_out, teacher_temp, reduce=_logsumexp_of_processes)

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Update the center with the logits of all training calls since the last update, on all processes.

        Without such calls the center stays unchanged. Each training call does this by itself unless
        `defer_center_update` is set. All processes have to call it.
        """
        if self.center is None:
            return
        check_number("center_momentum", self.center_momentum, 0, 1)  # it may be scheduled
        collected, self._collected = self._collected, None
        if has_processes():
            if collected is None:  # the other processes may have some
                collected = self.center.new_zeros(self.output_dim + 1)
            dist.all_reduce(collected)
        if collected is not None:
            sums, count = collected[:-1], collected[-1]
            mean = torch.where(count > 0, sums / count, self.center)  # without waiting for the device
            self.center.lerp_(mean, 1 - self.center_momentum)

    def _prepare(self, teacher: Outputs, epoch: int | None, teacher_temp: float | None) -> tuple[Tensor, float]:
        """Center and temperature for the teacher's outputs of a call."""
        if teacher_temp is None:
            teacher_temp = self.temperature(epoch)
        if teacher.output_dim != self.output_dim:
            raise ValueError(
                f"the loss was made for {self.output_dim} prototypes (output_dim), got a teacher with "
                f"{teacher.output_dim}: give loss and head the same output_dim"
            )
        return self.center_for(teacher, teacher_temp), teacher_temp

    @torch.no_grad()
    def _after_call(self, teacher: Outputs) -> None:
        """Collect the teacher's logits of a call, and update the center unless this is deferred."""
        if not self.training or self.center is None:
            return
        sums = teacher.sum_of_logits()
        sums = torch.cat([sums, sums.new_full((1,), teacher.views * teacher.samples)])
        self._collected = sums if self._collected is None else self._collected + sums
        if not self.defer_center_update:
            self.apply_center_update()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CenteredLoss":
        # `.half()` and similar calls move the center to the module's device but keep it in float32.
        before = self.center
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.center is not None and self.center.dtype != torch.float32:
            self.center = before.to(self.center.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Other libraries keep the center as (K,) or (1, K).
        key = prefix + "center"
        center = state_dict.get(key)
        missing_keys, unexpected_keys, error_msgs = args[-3:]
        if center is not None and self.center is not None:
            if center.numel() == self.output_dim:
                state_dict[key] = center.float().reshape(1, 1, -1)
            else:
                error_msgs.append(
                    f"{key} has {center.numel()} prototypes, but this {type(self).__name__} has "
                    f"output_dim={self.output_dim}: set the output_dim of the head whose weights are loaded"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
        name = type(self).__name__
        without = "strict=False (in a LightningModule, strict_loading = False)"
        add_remedy(
            missing_keys,
            key,
            f'the state dict is from a loss without a center, set {name}(centering="sinkhorn"), or start with a center '
            f"of 0, with {without}",
        )
        add_remedy(
            unexpected_keys,
            key,
            f'the state dict is from a loss with a center, set {name}(centering="mean"), or drop the center, '
            f"with {without}",
        )


class DINOLoss(CenteredLoss):
    """Cross-entropy between teacher and student views with a centered teacher (arXiv:2104.14294, equations 3 and 4).

        loss = mean over t != s and the batch of  H(softmax((teacher_t - c) / tau_t), softmax(student_s / tau_s))

    Both sides are logits, or both are `FactoredLogits`, which give the same loss and gradients without materialising
    the logits. `CenteredLoss` describes the center `c`.

    Args:
        output_dim: Number K of prototypes.
        warmup_teacher_temp: Temperature of the teacher in epoch 0, > 0.
        teacher_temp: Temperature of the teacher after the warm-up, > 0.
        warmup_teacher_temp_epochs: Length of the linear warm-up in epochs, see `teacher_temperature`.
        student_temp: Temperature of the student, > 0.
        center_momentum: Share m of the old center in the new one, in [0, 1].
        centering: Centering of the teacher, "mean" or "sinkhorn" (3 iterations; DINOv2, arXiv:2304.07193).

    Raises:
        ValueError: A size, temperature or momentum is out of range, or `centering` is unknown.

    >>> loss = DINOLoss(output_dim=16)
    >>> loss(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16), epoch=0)  # uniform on both sides: ln 16
    tensor(2.7726)
    """

    def forward(
        self, teacher_out: Logits, student_out: Logits, epoch: int | None = None, *, teacher_temp: float | None = None
    ) -> Tensor:
        """Outputs of the teacher (T, B, K) and the student (S, B, K) -> loss in nats, a scalar.

        Args:
            teacher_out: Logits of the T teacher views, a list of them, or FactoredLogits with z (T, B, D); they get no
                gradient.
            student_out: Outputs of the same kind of the S student views, the teacher's first, in the same order.
            epoch: Current epoch, which sets the teacher's temperature; None for the final temperature.
            teacher_temp: Temperature of the teacher that overrides `epoch`, for a schedule by step.

        Raises:
            ValueError: Kinds, shapes or types that do not match, no pair of different views, or a temperature <= 0.
        """
        teacher = as_outputs(teacher_out)
        center, temp = self._prepare(teacher, epoch, teacher_temp)
        loss = dino_loss(teacher, student_out, center=center, teacher_temp=temp, student_temp=self.student_temp)
        self._after_call(teacher)
        return loss


class IBOTPatchLoss(CenteredLoss):
    """Cross-entropy between teacher and student on masked patches (iBOT, arXiv:2111.07832; DINOv2, arXiv:2304.07193).

        loss = 1 / V  sum over the masked patches n of  H(p_n, q_n) / m,   m: number of masked patches of n's view

    with p and q as in `DINOLoss`. The V views include those without a mask, so masking half of them halves the loss, as
    in the authors' code. The center is the mean over the masked patches of all processes, weighted by their number
    (the authors average the means of the processes). A process without a masked patch contributes 0.

    Only the masked patches go through the patch heads of both sides:

        indices = masks.flatten().nonzero().squeeze(1).to(tokens.device, non_blocking=True)   # masks (V, N), on the CPU
        masked = tokens.flatten(0, 1).index_select(0, indices)                                # (V, N, D) -> (M, D)

    The arguments are those of `DINOLoss`.

    >>> loss = IBOTPatchLoss(output_dim=16)
    >>> masks = torch.tensor([[True, True, False, False], [True, False, False, False]])
    >>> loss(torch.zeros(3, 16), torch.zeros(3, 16), masks, epoch=0)  # uniform on both sides: ln 16
    tensor(2.7726)
    """

    def forward(
        self,
        teacher_out: Tokens,
        student_out: Tokens,
        masks: Tensor,
        epoch: int | None = None,
        *,
        teacher_temp: float | None = None,
    ) -> Tensor:
        """Outputs of both sides for the M masked patches -> loss in nats, a scalar.

        Args:
            teacher_out: Logits (M, K), or FactoredLogits with z (M, D), in the order of patches[masks]; they get no
                gradient. M may be 0, which gives a loss of 0 and gradients of 0.
            student_out: Outputs of the same kind, in the same order.
            masks: Boolean masks (V, N) or (V, *grid) of all V views, True where masked, on the CPU. On another device,
                each call waits for the device.
            epoch: Current epoch, which sets the teacher's temperature; None for the final temperature.
            teacher_temp: Temperature of the teacher that overrides `epoch`, for a schedule by step.

        Raises:
            ValueError: Kinds, shapes or types that do not match, a view without a visible patch, or a temperature <= 0.
        """
        teacher = as_token_outputs(teacher_out)
        weights = patch_weights(masks, teacher.samples).to(teacher.rows.device, non_blocking=True)
        center, temp = self._prepare(teacher, epoch, teacher_temp)
        loss = ibot_patch_loss(
            teacher, student_out, weights, center=center, teacher_temp=temp, student_temp=self.student_temp
        )
        self._after_call(teacher)
        return loss


def has_processes() -> bool:
    """Whether there are other processes, whose values have to be included."""
    return dist.is_available() and dist.is_initialized()


def _logsumexp_of_processes(log_sums: Tensor) -> Tensor:
    """(K,) of each process -> (K,), the same for all."""
    if not has_processes():
        return log_sums
    peaks = log_sums.clone()
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    sums = (log_sums - peaks).exp()
    dist.all_reduce(sums)
    return peaks + sums.log()
