"""The objective as pure functions: no state, no communication between processes.

Sizes: B samples, T teacher views, S student views, K prototypes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_head._arguments import check_number


def dino_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    center: Tensor | float = 0.0,
    teacher_temp: float = 0.07,
    student_temp: float = 0.1,
) -> Tensor:
    """Cross-entropy of each teacher view against each other student view (Caron et al. 2021, equation 3).

        p_t = softmax((teacher_t - center) / teacher_temp),  log q_s = log_softmax(student_s / student_temp)
        loss = mean over t != s and the batch of  -sum_k p_tk log q_sk

    The teacher's side gets no gradient. Probabilities are taken in float32 at least, whatever the logits' type.

    Args:
        teacher_logits: (T, B, K).
        student_logits: (S, B, K); its first T views are the teacher's, in the same order.
        center: (1, 1, K) or a number, subtracted from the teacher's logits.
        teacher_temp: > 0.
        student_temp: > 0.

    Returns:
        The loss in nats, a scalar.

    Raises:
        ValueError: shapes that do not fit, no sample, no pair of different views, or a temperature <= 0.

    >>> dino_loss(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16))  # uniform on both sides: ln 16
    tensor(2.7726)
    """
    _check_views(teacher_logits, student_logits)
    check_number("teacher_temp", teacher_temp, 0, float("inf"), exclude_minimum=True)
    check_number("student_temp", student_temp, 0, float("inf"), exclude_minimum=True)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    targets = F.softmax((teacher_logits.detach().to(dtype) - center) / teacher_temp, dim=-1)
    log_q = F.log_softmax(student_logits.to(dtype) / student_temp, dim=-1)
    pairs = [(t, s) for t in range(len(targets)) for s in range(len(log_q)) if s != t]
    cross_entropies = [-(targets[t] * log_q[s]).sum(dim=-1).mean() for t, s in pairs]  # each: (B, K) -> ()
    return torch.stack(cross_entropies).mean()


def _check_views(teacher: Tensor, student: Tensor) -> None:
    given = f"got teacher {tuple(teacher.shape)} and student {tuple(student.shape)}"
    if teacher.dim() != 3 or student.dim() != 3:
        raise ValueError(f"the loss expects teacher (T, B, K) and student (S, B, K), {given}: stack the views first")
    if teacher.shape[1:] != student.shape[1:]:
        raise ValueError(f"teacher and student must have the same B and K, {given}")
    if teacher.shape[1] == 0:
        raise ValueError(f"the loss needs at least one sample, {given}: leave empty batches out")
    if not 1 <= len(teacher) <= len(student):
        raise ValueError(
            f"the student must see the teacher's views first and at least as many of them, {given}: "
            "pass views in the order global, local on both sides"
        )
    if len(teacher) == len(student) == 1:
        raise ValueError(f"no pair of different views is left with one view a side, {given}: add a view")
