"""The objective as pure functions: no state, and no communication between processes but through an argument.

Sizes: B samples, T teacher views, S student views, K prototypes, D bottleneck width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dino_head._arguments import check_integer, check_number
from dino_head._fused import BlockMemory, FactoredObjective, LogitsObjective
from dino_head.prototypes import FactoredLogits

BLOCK_BYTES = 2**27

Logits = Tensor | Sequence[Tensor] | FactoredLogits


def dino_loss(
    teacher_out: Logits,
    student_out: Logits,
    *,
    center: Tensor | float = 0.0,
    teacher_temp: float = 0.07,
    student_temp: float = 0.1,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """Cross-entropy of each teacher view against each other student view (Caron et al. 2021, equation 3).

        p_t = softmax((teacher_t - center) / teacher_temp),  log q_s = log_softmax(student_s / student_temp)
        loss = mean over t != s and the batch of  -sum_k p_tk log q_sk

    The sum over pairs is taken before that over k. With z_s = student_s / student_temp and n_s the number of teacher
    views other than s, it is

        sum_s  n_s logsumexp(z_s) - (sum_{t != s} p_t) . z_s,    gradient in z_s:  n_s q_s - sum_{t != s} p_t

    so loss and gradients of some samples follow from the logits of these samples. From `FactoredLogits` they are
    computed block by block, and no more than a block of logits is ever in memory.

    Gradients are computed in forward (not without grad mode) and kept in float32 at least; backward scales them. The
    teacher's side and the center get none. Logits of low precision are summed in float32. Under autocast the products
    of `FactoredLogits` are taken in autocast's type.

    Args:
        teacher_out: logits (T, B, K), a list of T tensors (B, K), or FactoredLogits with z (T, B, D).
        student_out: of the same kind, (S, B, K); its first T views are the teacher's, in the same order.
        center: (K,), (1, 1, K) or a number, subtracted from the teacher's logits.
        teacher_temp: > 0.
        student_temp: > 0.
        block_bytes: memory for a block of logits of FactoredLogits (at least one sample's).

    Returns:
        The loss in nats, a scalar.

    Raises:
        ValueError: kinds, shapes or types that do not fit, swapped sides, no sample, no pair of different views, or a
            temperature <= 0.
        RuntimeError: in a second derivative.

    >>> dino_loss(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16))  # uniform on both sides: ln 16
    tensor(2.7726)
    """
    check_number("teacher_temp", teacher_temp, 0, float("inf"), exclude_minimum=True)
    check_number("student_temp", student_temp, 0, float("inf"), exclude_minimum=True)
    check_integer("block_bytes", block_bytes, 1)
    teacher, student = stacked(teacher_out), stacked(student_out)
    check_sides(teacher, student)
    teacher = _detached(teacher)
    center = flat_center(center, teacher)
    if not torch.is_grad_enabled():
        student = _detached(student)
    temperatures = float(teacher_temp), float(student_temp)
    if isinstance(student, FactoredLogits):
        options = (*temperatures, _product_dtype(student), block_bytes)
        with torch.autocast(student.z.device.type, enabled=False):
            loss: Tensor = FactoredObjective.apply(  # type: ignore[no-untyped-call]
                *teacher, *student, center, *options
            )
    else:
        with torch.autocast(student.device.type, enabled=False):
            loss = LogitsObjective.apply(teacher, student, center, *temperatures)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def sinkhorn_center(
    teacher_out: Logits,
    teacher_temp: float,
    *,
    iterations: int = 3,
    reduce: Callable[[Tensor], Tensor] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """The center that spreads a batch evenly over the prototypes (Caron et al. 2020, arXiv:2006.09882; DINOv2).

    Sinkhorn-Knopp scales exp(teacher / teacher_temp) so that in turn each prototype and each sample get equal shares.
    In the log domain, with M = teacher / teacher_temp and potentials f of the prototypes and g of all T B samples:

        g = 0;  then in each iteration  f_k = logsumexp_n(M_nk - g_n),  g_n = logsumexp_k(M_nk - f_k)

    The assignment is exp(M_nk - f_k - g_n) = softmax_k((teacher_nk - c_k) / teacher_temp) with c = teacher_temp f: that
    of a teacher with the center c. Finite at any scale of the logits.

    Args:
        teacher_out: as for `dino_loss`.
        teacher_temp: > 0.
        iterations: >= 1.
        reduce: takes the log-sums (K,) over this process's samples to those over all processes'.
        block_bytes: as for `dino_loss`; FactoredLogits are multiplied again in each iteration.

    Returns:
        c, for `dino_loss(..., center=c)`: (K,), float32 at least.

    Raises:
        ValueError: kinds, shapes or types that do not fit, a temperature <= 0, or no iteration.
    """
    check_number("teacher_temp", teacher_temp, 0, float("inf"), exclude_minimum=True)
    check_integer("iterations", iterations, 1)
    teacher = stacked(teacher_out)
    potential: Tensor | None = None  # f; g follows from it
    for _ in range(iterations):
        log_sums: Tensor | None = None
        for logits in _blocks_over_temperature(teacher, float(teacher_temp), block_bytes):  # (T b, K)
            if potential is not None:
                logits = logits - (logits - potential).logsumexp(dim=1, keepdim=True)
            of_block = logits.logsumexp(dim=0)
            log_sums = of_block if log_sums is None else torch.logaddexp(log_sums, of_block)
        assert log_sums is not None  # there is at least one sample
        potential = log_sums if reduce is None else reduce(log_sums)
    assert potential is not None
    return potential * teacher_temp


@torch.no_grad()
def sum_logits(teacher_out: Logits) -> Tensor:
    """Sum of the logits over views and samples, (K,) in float32; of FactoredLogits through the sum of their z."""
    teacher = stacked(teacher_out)
    if isinstance(teacher, Tensor):
        return teacher.sum(dim=(0, 1), dtype=torch.float32)
    with torch.autocast(teacher.z.device.type, enabled=False):
        return teacher.prototypes.float() @ teacher.z.sum(dim=(0, 1), dtype=torch.float32)


def stacked(out: Logits) -> Tensor | FactoredLogits:
    """All views of a side at once, checked: logits (V, B, K), or FactoredLogits with z (V, B, D)."""
    if not isinstance(out, (Tensor, FactoredLogits)):
        views: list[Any] = list(out) if isinstance(out, (list, tuple)) else [out]
        if not views or not all(isinstance(view, Tensor) and view.shape == views[0].shape for view in views):
            given = [tuple(view.shape) if isinstance(view, Tensor) else type(view).__name__ for view in views]
            raise ValueError(
                f"views must be a list of logits (B, K) of one shape, got {given}: give a tensor (V, B, K), a list of "
                "tensors (B, K), or one FactoredLogits with the z of all views, (V, B, D)"
            )
        out = torch.stack(views)
    by_view, name = (out, "logits (V, B, K)") if isinstance(out, Tensor) else (out.z, "z (V, B, D)")
    shape = tuple(by_view.shape)
    if len(shape) != 3:
        raise ValueError(f"the loss expects {name} of V views, got {shape}: stack the views first")
    if 0 in shape:
        raise ValueError(f"the loss needs at least one sample, got {name} of shape {shape}: leave empty batches out")
    if isinstance(out, FactoredLogits) and (out.prototypes.dim() != 2 or out.prototypes.shape[1] != shape[2]):
        raise ValueError(
            f"FactoredLogits expects z (V, B, D) and prototypes (K, D) of the same D, got {shape} and "
            f"{tuple(out.prototypes.shape)}: take both from head.factored_logits"
        )
    for tensor in out if isinstance(out, FactoredLogits) else (out,):
        if not tensor.is_floating_point():
            raise ValueError(f"the loss expects floating-point logits, got {tensor.dtype}: convert with .float()")
    return out


def flat_center(center: Tensor | float, teacher: Tensor | FactoredLogits) -> Tensor | float:
    """The center as (K,) or a number, checked."""
    if not isinstance(center, Tensor):
        return center
    if center.numel() != output_dim(teacher):
        raise ValueError(
            f"center must be a number or hold one for each of K = {output_dim(teacher)} prototypes, got "
            f"{tuple(center.shape)}: give loss and head the same output_dim"
        )
    return center.flatten()


def output_dim(out: Tensor | FactoredLogits) -> int:
    """K."""
    return out.shape[-1] if isinstance(out, Tensor) else len(out.prototypes)


def check_sides(teacher: Tensor | FactoredLogits, student: Tensor | FactoredLogits) -> None:
    """Raise ValueError unless both sides fit together."""
    sizes = []
    for side in (teacher, student):
        views, samples, _ = (side if isinstance(side, Tensor) else side.z).shape
        sizes.append((views, samples, output_dim(side)))
    (views_t, *_), (views_s, *_) = sizes
    given = f"got teacher {sizes[0]} and student {sizes[1]} as (views, B, K)"
    if isinstance(teacher, Tensor) != isinstance(student, Tensor):
        raise ValueError(
            f"teacher and student must both be logits or both FactoredLogits, got {type(teacher).__name__} and "
            f"{type(student).__name__}: use head.factored_logits on both sides, or the head itself"
        )
    if sizes[0][1:] != sizes[1][1:]:
        raise ValueError(f"teacher and student must have the same B and K, {given}")
    if views_t > views_s:
        raise ValueError(
            f"the student must see the teacher's views first and at least as many of them, {given}: "
            "pass views in the order global, local on both sides"
        )
    if views_t == views_s == 1:
        raise ValueError(f"no pair of different views is left with one view a side, {given}: add a view")
    if torch.is_grad_enabled() and _requires_grad(teacher) and not _requires_grad(student):
        raise ValueError(
            "teacher_out requires a gradient and student_out does not, so that nothing would be trained: give the "
            "teacher's outputs first, made under torch.no_grad()"
        )


def _detached(out: Tensor | FactoredLogits) -> Tensor | FactoredLogits:
    return out.detach() if isinstance(out, Tensor) else FactoredLogits(*(tensor.detach() for tensor in out))


def evenly(total: int, count: int) -> list[int]:
    """`count` of the indices 0 to total - 1, evenly spread, the first and the last among them; all if count = total."""
    return [index * (total - 1) // max(1, count - 1) for index in range(count)]


def _requires_grad(out: Tensor | FactoredLogits) -> bool:
    return any(tensor.requires_grad for tensor in ((out,) if isinstance(out, Tensor) else out))


def _product_dtype(factored: FactoredLogits) -> torch.dtype:
    """The type in which autocast, or type promotion without it, would multiply."""
    dtype, device = torch.promote_types(factored.z.dtype, factored.prototypes.dtype), factored.z.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and dtype != torch.float64 else dtype


def _blocks_over_temperature(teacher: Tensor | FactoredLogits, temp: float, block_bytes: int) -> Iterator[Tensor]:
    """Logits over temperature (V b, K), float32 at least, block by block; each is overwritten by the next."""
    if isinstance(teacher, Tensor):
        yield teacher.flatten(end_dim=1).to(torch.promote_types(teacher.dtype, torch.float32)) / temp
        return
    prototypes = teacher.prototypes.to(_product_dtype(teacher))
    with torch.autocast(teacher.z.device.type, enabled=False):
        memory = BlockMemory((len(teacher.z),), teacher.z.shape[1], prototypes, block_bytes)
        for part in memory.parts:
            (logits,) = memory.views(part)
            memory.multiply_(logits, teacher.z[:, part].to(prototypes.dtype).flatten(end_dim=1), prototypes, temp)
            yield logits.flatten(end_dim=1)
