"""The DINO loss: an efficient implementation, and a plain one for comparison.

Sizes: B samples, T teacher views, S student views, K prototypes, D bottleneck width.
"""

import torch
from torch import Tensor

from dino_head._arguments import check_integer, check_number
from dino_head.functional._blocks import objective
from dino_head.functional._outputs import Logits, as_outputs, check_sides, check_views, flat_center
from dino_head.functional._workspace import BLOCK_BYTES


def dino_loss(
    teacher_out: Logits,
    student_out: Logits,
    *,
    center: Tensor | float = 0.0,
    teacher_temp: float = 0.07,
    student_temp: float = 0.1,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """Cross-entropy between each teacher view and each other student view (Caron et al. 2021, equation 3).

        p_t = softmax((teacher_t - center) / teacher_temp),  log q_s = log_softmax(student_s / student_temp)
        loss = mean over t != s and the batch of  -sum_k p_tk log q_sk

    `reference_dino_loss` computes it in that order. Here the sum over pairs is taken before the sum over k. With
    z_s = student_s / student_temp and n_s the number of teacher views other than s, it is

        sum_s  n_s logsumexp(z_s) - (sum_{t != s} p_t) . z_s,    gradient in z_s:  n_s q_s - sum_{t != s} p_t

    so that loss and gradients of a block of samples need only the logits of this block. `FactoredLogits` are multiplied
    block by block, and at most one block of logits is in memory at a time.

    With grad mode on, forward computes the gradients and keeps them in float32 or higher; backward scales them. The
    teacher and the center get no gradient. Logits of low precision are summed in float32. Under autocast the products
    of `FactoredLogits` are computed in autocast's type.

    Args:
        teacher_out: Logits (T, B, K), a list of T tensors (B, K), or FactoredLogits with z (T, B, D).
        student_out: Outputs of the same kind, (S, B, K); its first T views are the teacher's, in the same order.
        center: Values (K,) or (1, 1, K), or a number, subtracted from the teacher's logits.
        teacher_temp: Temperature of the teacher, > 0.
        student_temp: Temperature of the student, > 0.
        block_bytes: Memory in bytes for one block of logits from FactoredLogits; a block has at least one sample.

    Returns:
        The loss in nats, a scalar.

    Raises:
        ValueError: Kinds, shapes or types that do not match, swapped sides, no sample, no pair of different views, or a
            temperature <= 0.
        RuntimeError: A second derivative is computed.

    >>> dino_loss(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16))  # uniform on both sides: ln 16
    tensor(2.7726)
    """
    check_number("teacher_temp", teacher_temp, 0, float("inf"), exclude_minimum=True)
    check_number("student_temp", student_temp, 0, float("inf"), exclude_minimum=True)
    check_integer("block_bytes", block_bytes, 1)
    teacher, student = as_outputs(teacher_out), as_outputs(student_out)
    check_sides(teacher, student)
    check_views(teacher, student)
    return objective(
        teacher,
        student,
        center=flat_center(center, teacher.output_dim),
        teacher_temp=teacher_temp,
        student_temp=student_temp,
        block_bytes=block_bytes,
    )


def reference_dino_loss(
    teacher: Tensor,
    student: Tensor,
    *,
    center: Tensor | float = 0.0,
    teacher_temp: float = 0.07,
    student_temp: float = 0.1,
) -> Tensor:
    """`dino_loss` as the paper writes it: a loop over pairs of views, in float64, with autograd's gradients.

    The tests compare `dino_loss` with it. Logits (T, B, K) and (S, B, K), center (K,) or a number -> loss in nats.

    >>> reference_dino_loss(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16))
    tensor(2.7726, dtype=torch.float64)
    """
    pairs = []
    for t, teacher_view in enumerate(teacher.detach().double()):  # (B, K)
        p = ((teacher_view - center) / teacher_temp).softmax(dim=-1)
        for s, student_view in enumerate(student.double()):  # (B, K)
            if s != t:
                log_q = (student_view / student_temp).log_softmax(dim=-1)
                pairs.append(-(p * log_q).sum(dim=-1).mean())
    return torch.stack(pairs).mean()
