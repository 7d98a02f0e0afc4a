"""Loss and gradients of the objectives in one pass, from logits or block by block from their factors.

The DINO loss compares each of T teacher views with each other of S student views. The iBOT loss compares masked
patches, which are samples of one teacher view and one student view, with a weight for each. Forward computes the
gradients and keeps them in float32 or higher; backward scales them.

Sizes: B samples, of which b are in a block, T teacher views, S student views, K prototypes, D bottleneck width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_head.functional._outputs import Outputs
from dino_head.functional._workspace import BLOCK_BYTES, LN2, LogitsWorkspace, at_least_float32


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
    """Cross-entropies of outputs that match: their mean, or their sum with `weights` (B,) of the samples.

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


def cross_entropies_(
    teacher: Tensor, student: Tensor, spare: Tensor, weights: Tensor | None, scale: float | None
) -> Tensor:
    """Sum over the pairs of views and the samples of H(p_t, q_s), p_t = softmax(teacher_t), q_s = softmax(student_s).

        sum_s  n_s logsumexp(student_s) - (sum_{t != s} p_t) . student_s        because each p_t sums to 1

    where n_s is the number of teacher views other than s: T - 1 for s < T, else T. A single student view is compared
    with a single teacher view. The gradient in student_s is n_s q_s - sum_{t != s} p_t.

    Args:
        teacher: Logits over temperature (T, b, K); overwritten.
        student: Logits over temperature, in base 2: divided by ln 2 as well (S, b, K). Overwritten by the gradient in
            the logits over temperature, times `scale`.
        spare: Memory (`spare_views(S)`, b, K); overwritten.
        weights: Factors (b, 1) of the samples; None for 1.
        scale: Factor of the gradient; None if it is not needed.
    """
    # Few passes over all views, because the threads wait for each other after each pass. Powers of 2 take half as long
    # as those of e, which are very slow for large negative exponents.
    unit, products = 1.0 if weights is None else weights, spare[0]
    for p in teacher:  # contiguous, so that it works in place
        torch.softmax(p, dim=-1, out=p)
    # Softmax's own sum loses small terms if K is large: p then sums to 1 with an error of up to 1e-5.
    teacher.mul_(unit / teacher.sum(dim=-1, keepdim=True))
    student.sub_(student.amax(dim=-1, keepdim=True))  # no two terms of the loss then have opposite signs, or cancel
    # Sums of products instead of dot products, which lose small terms like softmax.
    if len(student) == 1:
        torch.mul(teacher[0], student[0], out=products)
        groups = [(teacher, slice(1), 1)]
    else:
        shared, others = slice(len(teacher)), slice(len(teacher), None)
        total = torch.sum(teacher, dim=0, out=spare[1])
        torch.sub(total, teacher, out=teacher)
        torch.sum(student[others], dim=0, out=products).mul_(total)
        for targets, x in zip(teacher, student[shared], strict=True):
            products.addcmul_(targets, x)
        groups = [(teacher, shared, len(teacher) - 1), (total, others, len(teacher))]
    loss = -products.sum()
    sums = student.exp2_().sum(dim=-1, keepdim=True)
    for targets, views, pairs in groups:
        loss += pairs * (sums[views].log2() * unit).sum()
        if scale is not None:
            if scale != -1:
                targets.mul_(-scale)
            torch.addcmul(targets, student[views], scale * pairs * unit / sums[views], out=student[views])
    return loss * LN2


def spare_views(student_views: int) -> int:
    """Number of views of logits for which `cross_entropies_` needs memory."""
    return 1 if student_views == 1 else 2


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
    torch.div(student, student.new_full((1,), student_temp * LN2, dtype=dtype), out=gradient)
    views, samples, outputs = student.shape
    step = max(1, BLOCK_BYTES // ((len(teacher) + views) * outputs * dtype.itemsize))
    spare = gradient.new_empty(spare_views(views), min(step, samples), outputs)
    scale, loss = 1 / student_temp if needs_gradient else None, gradient.new_zeros(())
    for start in range(0, samples, step):
        part = slice(start, min(start + step, samples))
        factors = None if weights is None else weights[part, None].to(dtype)
        loss += cross_entropies_(targets[:, part], gradient[:, part], spare[:, : part.stop - start], factors, scale)
    return loss, gradient if needs_gradient else loss.new_empty(0)


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
    samples, dtype = student_z.shape[1], prototypes.dtype
    views = len(teacher_z), len(student_z), spare_views(len(student_z))
    workspace = LogitsWorkspace(views, samples, prototypes, block_bytes)
    scale = -1 / (workspace.gradient_scale * student_temp)  # of the products with the negative gradient
    loss = workspace.logits.new_zeros(())
    grad_z = loss.new_empty(student_z.shape if needs_z else 0)
    grad_prototypes = loss.new_empty(prototypes.shape if needs_prototypes else 0)
    if not samples:
        grad_prototypes.zero_()
    for block in workspace.blocks:
        z = student_z[:, block].to(dtype).flatten(end_dim=1)  # (S b, D)
        z_teacher = teacher_z[:, block].to(dtype).flatten(end_dim=1)  # (T b, D)
        teacher, student, spare = workspace.split(block)
        factors = None if weights is None else weights[block, None].to(loss.dtype)
        workspace.multiply_(teacher, z_teacher, teacher_prototypes, teacher_temp)
        workspace.multiply_(student, z, prototypes, student_temp * LN2)
        teacher.sub_(center / teacher_temp)
        loss += cross_entropies_(teacher, student, spare, factors, -1.0 if needs_z or needs_prototypes else None)
        if needs_z or needs_prototypes:
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
            unit = F.pad(weights.abs(), (0, 1)).amax().clamp(min=torch.finfo(weights.dtype).tiny)
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
