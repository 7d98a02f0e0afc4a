"""The DINO objective as a module that holds the center.

Sizes: B samples, T teacher views, S student views, K prototypes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dino_head._arguments import check_integer, check_number
from dino_head.functional import dino_loss
from dino_head.schedules import teacher_temperature


class DINOLoss(nn.Module):
    """Cross-entropy between teacher and student views with a centered teacher (arXiv:2104.14294, equations 3 and 4).

        loss = mean over t != s and the batch of  H(softmax((teacher_t - c) / tau_t), softmax(student_s / tau_s))
        c <- m c + (1 - m) mean of the teacher's logits

    In training each call moves the center `c` after the loss is computed, by the mean over the samples of all
    processes; in evaluation mode it stays. The center is float32 whatever the model's precision, and part of the
    state dict.

    Args:
        output_dim: K.
        warmup_teacher_temp: the teacher's temperature in epoch 0.
        teacher_temp: the teacher's temperature after the warm-up.
        warmup_teacher_temp_epochs: epochs of the linear warm-up, see `teacher_temperature`.
        student_temp: the student's temperature.
        center_momentum: m, in [0, 1].

    Raises:
        ValueError: a size, temperature or momentum out of range.

    >>> loss = DINOLoss(output_dim=16)
    >>> loss(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16), epoch=0)  # uniform on both sides: ln 16
    tensor(2.7726)
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 4096,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.07,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
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
        self.output_dim = output_dim
        self.warmup_teacher_temp = warmup_teacher_temp
        self.teacher_temp = teacher_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, 1, output_dim, dtype=torch.float32))

    def forward(
        self, teacher_out: Tensor, student_out: Tensor, epoch: int | None = None, *, teacher_temp: float | None = None
    ) -> Tensor:
        """Logits of the teacher (T, B, K) and the student (S, B, K) -> loss in nats, a scalar.

        Args:
            teacher_out: logits of the T teacher views; no gradient flows into them.
            student_out: logits of the S student views, the teacher's first, in the same order.
            epoch: the current epoch, for the teacher's temperature; None: the final one.
            teacher_temp: overrides the temperature, for a schedule by step.

        Raises:
            ValueError: shapes that do not fit, no pair of different views, or a temperature <= 0.
        """
        if teacher_temp is None:
            teacher_temp = self.temperature(epoch)
        if teacher_out.shape[-1:] != self.center.shape[-1:]:
            raise ValueError(
                f"the loss was made for {self.output_dim} prototypes (output_dim), got teacher logits of shape "
                f"{tuple(teacher_out.shape)}: give loss and head the same output_dim"
            )
        loss = dino_loss(
            teacher_out, student_out, center=self.center, teacher_temp=teacher_temp, student_temp=self.student_temp
        )
        if self.training:
            self._update_center(teacher_out.detach())
        return loss

    def temperature(self, epoch: int | None = None) -> float:
        """The teacher's temperature in an epoch; None: the final one."""
        return teacher_temperature(epoch, self.warmup_teacher_temp, self.teacher_temp, self.warmup_teacher_temp_epochs)

    @torch.no_grad()
    def _update_center(self, teacher_out: Tensor) -> None:
        # (K + 1,): the sum of the logits and, behind it, their number, so that one reduction averages by samples.
        views, samples, _ = teacher_out.shape
        total = teacher_out.sum(dim=(0, 1), dtype=torch.float32)
        total = F.pad(total, (0, 1), value=views * samples)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        self.center.lerp_(total[:-1] / total[-1], 1 - self.center_momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DINOLoss":
        # `.half()` and friends move the center with the module but leave it float32.
        center = self.center
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.center.dtype != torch.float32:
            self.center = center.to(self.center.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Other libraries keep the center as (K,) or (1, K).
        center = state_dict.get(prefix + "center")
        if center is not None and center.numel() == self.output_dim:
            state_dict[prefix + "center"] = center.float().reshape(1, 1, -1)
        super()._load_from_state_dict(state_dict, prefix, *args)
