"""Loss and gradients of the objectives in one pass, from logits or block by block from their factors.

The DINO loss compares each of T teacher views with each other of S student views. The iBOT loss compares masked tokens,
which are samples of one teacher view and one student view, with a weight for each. Forward computes the gradients and
keeps them in float32 or higher; backward scales them.

Sizes: B samples, of which b are in a block, T teacher views, S student views, K prototypes, D bottleneck width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_head.functional._outputs import Outputs
from dino_head.functional._workspace import LogitsWorkspace, at_least_float32


def objective(
    teacher: Outputs,
    student: Outputs,
    *,
    weights: Tensor | None = None,
    center: Tensor | float,
    teacher_temp: float,
    student_temp: float,
    block_bytes: int,
) -> Tensor:
    """Cross-entropies of outputs that match: their mean, or their sum with `weights` (B,) >= 0 of the samples.

    Neither the teacher nor the center nor the weights get a gradient.
    """
    if not torch.is_grad_enabled():
        student = student.detach()
    temperatures = float(teacher_temp), float(student_temp)
    if not isinstance(center, Tensor):
        center = student.rows.new_full((1,), center, dtype=at_least_float32(student.rows.dtype))
    if weights is not None:
        weights = weights.detach()
    inputs = *teacher.detach(), *student, center, weights, *temperatures
    loss: Tensor = _Objective.apply(*inputs, student.product_dtype, block_bytes)  # type: ignore[no-untyped-call]
    return loss


def cross_entropies_(teacher: Tensor, student: Tensor, total: Tensor | None, weights: Tensor | None) -> Tensor:
    """Sum over the pairs of views and the samples of H(p_t, q_s), p_t = softmax(teacher_t), q_s = softmax(student_s).

        sum_s  n_s logsumexp(student_s) - (sum_{t != s} p_t) . student_s        because each p_t sums to 1

    where n_s is the number of teacher views other than s: T - 1 for s < T, else T. A single student view is compared
    with a single teacher view. The sum is exact at any scale of the logits, because their maximum is subtracted first,
    after which no two terms have opposite signs.

    Args:
        teacher: Logits over temperature (T, b, K); overwritten by the targets of the first T student views.
        student: Logits over temperature (S, b, K); overwritten by the q_s.
        total: Buffer (b, K); overwritten by the targets of the other student views, the sum of all p_t. None if S = 1.
        weights: Factors (b, 1) of the samples, None for 1. The targets are multiplied by them.
    """
    views = len(teacher)
    torch.softmax(teacher, dim=-1, out=teacher)
    if weights is not None:
        teacher.mul_(weights)
    if total is not None:
        torch.sum(teacher, dim=0, out=total)
        torch.sub(total, teacher, out=teacher)
    student.sub_(student.amax(dim=-1, keepdim=True))
    agreement = torch.dot(teacher.flatten(), student[:views].flatten())
    if total is not None:
        agreement = agreement + torch.mv(student[views:].flatten(start_dim=1), total.flatten()).sum()
    torch.softmax(student, dim=-1, out=student)
    log_sums = student.amax(dim=-1, keepdim=True).log().neg()  # the largest q is exp(0 - logsumexp)
    if weights is not None:
        log_sums = log_sums * weights
    return _pairs(views, total) * log_sums[:views].sum() + views * log_sums[views:].sum() - agreement


def gradients_(
    targets: Tensor, student: Tensor, total: Tensor | None, weights: Tensor | None, scale: float = -1.0
) -> None:
    """Overwrite `student` with its gradient times `scale`, from the results of `cross_entropies_`.

    The gradient is n_s q_s - sum_{t != s} p_t. (A scale of -1 is the cheapest.)
    """
    views = len(targets)
    global_views, local_views = student[:views], student[views:]
    if weights is not None:
        student.mul_(weights)
    if scale != -1:
        targets.mul_(-scale)
    torch.add(targets, global_views, alpha=scale * _pairs(views, total), out=global_views)
    if total is not None:
        if scale != -1:
            total.mul_(-scale)
        torch.add(total, local_views, alpha=scale * views, out=local_views)


def _pairs(views: int, total: Tensor | None) -> int:
    """Number of teacher views with which each of the first student views is compared."""
    return 1 if total is None else views - 1


def _sum_and_gradients(
    teacher_rows: Tensor,
    teacher_prototypes: Tensor | None,
    student_rows: Tensor,
    student_prototypes: Tensor | None,
    center: Tensor,
    weights: Tensor | None,
    teacher_temp: float,
    student_temp: float,
    dtype: torch.dtype,
    block_bytes: int,
    needs_rows: bool,
    needs_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the cross-entropies, and its gradients in the student's rows and prototypes; empty if not needed."""
    temperatures = teacher_temp, student_temp
    with torch.autocast(student_rows.device.type, enabled=False):
        if teacher_prototypes is None or student_prototypes is None:
            loss, gradient = _from_logits(teacher_rows, student_rows, center, weights, *temperatures, needs_rows)
            return loss, gradient, loss.new_empty(0)
        return _from_factors(
            teacher_rows, teacher_prototypes.to(dtype), student_rows, student_prototypes.to(dtype), center, weights,
            *temperatures, block_bytes, needs_rows, needs_prototypes,
        )  # fmt: skip


# The compiler calls it instead of tracing it: otherwise, it would unroll the loop over blocks again for each size.
_opaque_sum_and_gradients = torch.library.custom_op("dino_head::sum_and_gradients", _sum_and_gradients, mutates_args=())


@_opaque_sum_and_gradients.register_fake
def _empty_results(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the compiler has to know: shapes and types of the results."""
    _, _, rows, prototypes, *_, product_dtype, _, needs_rows, needs_prototypes = inputs
    dtype = at_least_float32(rows.dtype if prototypes is None else product_dtype)
    loss = rows.new_empty((), dtype=dtype)
    has_prototypes = needs_prototypes and prototypes is not None
    return (
        loss,
        loss.new_empty(rows.shape if needs_rows else 0),
        loss.new_empty(prototypes.shape if has_prototypes else 0),
    )


def _from_logits(
    teacher: Tensor,
    student: Tensor,
    center: Tensor,
    weights: Tensor | None,
    teacher_temp: float,
    student_temp: float,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor]:
    dtype = at_least_float32(student.dtype)
    targets = teacher.to(dtype, copy=True, memory_format=torch.contiguous_format).sub_(center).div_(teacher_temp)
    # A divisor with a dimension takes part in type promotion, which converts low precision to float32.
    gradient = student.new_empty(student.shape, dtype=dtype)
    torch.div(student, student.new_full((1,), student_temp, dtype=dtype), out=gradient)
    total = torch.empty_like(targets[0]) if len(student) > 1 else None
    factors = None if weights is None else weights[:, None].to(dtype)
    loss = cross_entropies_(targets, gradient, total, factors)
    if not needs_gradient:
        return loss, loss.new_empty(0)
    gradients_(targets, gradient, total, factors, 1 / student_temp)
    return loss, gradient


def _from_factors(
    teacher_z: Tensor,
    teacher_prototypes: Tensor,
    student_z: Tensor,
    prototypes: Tensor,
    center: Tensor,
    weights: Tensor | None,
    teacher_temp: float,
    student_temp: float,
    block_bytes: int,
    needs_z: bool,
    needs_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Products are computed in the prototypes' type, everything else in float32 or higher.

    The targets are subtracted inside the block, so there are no more products than in a bare forward and backward.
    """
    (views, samples, _), dtype = student_z.shape, prototypes.dtype
    # A single student view needs no memory for the sum of the targets.
    sides = (len(teacher_z), views, 1) if views > 1 else (len(teacher_z), views)
    workspace = LogitsWorkspace(sides, samples, prototypes, block_bytes)
    scale = -1 / (workspace.gradient_scale * student_temp)  # of the products with the negative gradient
    loss = workspace.logits.new_zeros(())
    grad_z = loss.new_empty(student_z.shape if needs_z else 0)
    grad_prototypes = loss.new_empty(prototypes.shape if needs_prototypes else 0)
    if not samples:
        grad_prototypes.zero_()
    for block in workspace.blocks:
        z = student_z[:, block].to(dtype).flatten(end_dim=1)  # (S b, D)
        z_teacher = teacher_z[:, block].to(dtype).flatten(end_dim=1)  # (T b, D)
        teacher, student, *buffer = workspace.split(block)
        total = buffer[0][0] if buffer else None
        factors = None if weights is None else weights[block, None].to(loss.dtype)
        workspace.multiply_(teacher, z_teacher, teacher_prototypes, teacher_temp)
        workspace.multiply_(student, z, prototypes, student_temp)
        loss += cross_entropies_(teacher.sub_(center / teacher_temp), student, total, factors)
        if needs_z or needs_prototypes:
            gradients_(teacher, student, total, factors)
            negative = workspace.scale_for_product_(student)  # (S b, K)
        if needs_z:
            grad_z[:, block] = (negative @ prototypes).to(loss.dtype).mul_(scale).view_as(grad_z[:, block])
        if needs_prototypes:
            workspace.add_product_(grad_prototypes, negative.T, z, scale, is_first=block.start == 0)
    return loss, grad_z, grad_prototypes


class _Objective(torch.autograd.Function):
    """The arguments of `_sum_and_gradients` but the last two -> the loss; only the student's gradients are saved."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        teacher, teacher_prototypes, student, prototypes, center, weights, *options = inputs
        ctx.dtypes = student.dtype, None if prototypes is None else prototypes.dtype
        unit: Tensor | float
        if weights is None:
            unit = 1 / (len(teacher) * (len(student) - 1) * student.shape[1])  # of pairs of views and samples
        else:  # the largest weight is 1 in the products, because small ones would vanish in float16
            unit = F.pad(weights, (0, 1)).amax().clamp(min=torch.finfo(weights.dtype).tiny)
            weights = weights / unit
        run = _opaque_sum_and_gradients if torch.compiler.is_compiling() else _sum_and_gradients
        needed = ctx.needs_input_grad[2:4]
        loss, *gradients = run(teacher, teacher_prototypes, student, prototypes, center, weights, *options, *needed)
        kept = [gradient if is_needed else None for gradient, is_needed in zip(gradients, needed, strict=True)]
        ctx.save_for_backward(*kept, unit if isinstance(unit, Tensor) else None)
        ctx.unit = unit
        return loss * unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *kept, unit = ctx.saved_tensors
        scale = grad * (ctx.unit if unit is None else unit)
        gradients = [_scaled(tensor, scale, dtype) for tensor, dtype in zip(kept, ctx.dtypes, strict=True)]
        return None, None, *gradients, *[None] * 6


def _scaled(kept: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    if kept is None:
        return None
    gradient = (kept * scale if _keeps_graph() else kept.mul_(scale)).to(dtype)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # in a backward with create_graph=True
        gradient = _NotDifferentiable.apply(gradient, torch.zeros((), requires_grad=True))  # type: ignore[no-untyped-call]
    return gradient


def _keeps_graph() -> bool:
    """Whether a later backward may need the kept gradients again, which then must not be overwritten."""
    # The function is private and may disappear; without it, each backward allocates memory of the gradients' size.
    keeps: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return torch.compiler.is_compiling() or keeps()


class _NotDifferentiable(torch.autograd.Function):
    """Identity on the gradient; differentiating it raises an error, because it would look like a constant."""

    @staticmethod
    def forward(_ctx: Any, gradient: Tensor, _link: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(_ctx: Any, _grad: Tensor) -> Any:
        raise RuntimeError(
            "the loss can be differentiated once: it computes its gradients in forward. For a second derivative, "
            "write the loss out with softmax and log_softmax"
        )
