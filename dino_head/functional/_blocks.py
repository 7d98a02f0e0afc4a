"""Loss and gradients of the objective in one pass, from logits or block by block from their factors.

Both autograd functions compute the gradients in forward, keep them in float32 or higher, and only scale them in
backward.

Sizes: B samples, of which b are in a block, T teacher views, S student views, K prototypes, D bottleneck width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 2**27  # 128 MiB


def cross_entropies_(teacher: Tensor, student: Tensor, total: Tensor) -> Tensor:
    """Sum over t != s and the samples of H(p_t, q_s), p_t = softmax(teacher_t), q_s = softmax(student_s).

        sum_s  n_s logsumexp(student_s) - (sum_{t != s} p_t) . student_s        because each p_t sums to 1

    where n_s is the number of teacher views other than s: T - 1 for s < T, else T.

    Args:
        teacher: Logits over temperature (T, b, K); overwritten by the targets of the first T student views.
        student: Logits over temperature (S, b, K); overwritten by the q_s.
        total: Buffer (b, K); overwritten by the targets of the other student views, the sum of all p_t.
    """
    views = len(teacher)
    torch.softmax(teacher, dim=-1, out=teacher)
    torch.sum(teacher, dim=0, out=total)
    torch.sub(total, teacher, out=teacher)
    agreement = torch.dot(teacher.flatten(), student[:views].flatten())
    agreement = agreement + torch.mv(student[views:].flatten(start_dim=1), total.flatten()).sum()
    peaks = student.amax(dim=-1)
    torch.softmax(student, dim=-1, out=student)
    log_sums = peaks - student.amax(dim=-1).log()  # the largest q is exp(peak - logsumexp)
    return (views - 1) * log_sums[:views].sum() + views * log_sums[views:].sum() - agreement


def gradients_(targets: Tensor, student: Tensor, total: Tensor, scale: float) -> None:
    """Overwrite `student` with its gradient times `scale`, from the results of `cross_entropies_`.

    The gradient is n_s q_s - sum_{t != s} p_t. (A scale of -1 is the cheapest.)
    """
    views = len(targets)
    global_views, local_views = student[:views], student[views:]
    if scale != -1:
        targets.mul_(-scale)
        total.mul_(-scale)
    torch.add(targets, global_views, alpha=scale * (views - 1), out=global_views)
    torch.add(total, local_views, alpha=scale * views, out=local_views)


class LogitsObjective(torch.autograd.Function):
    """Logits (T, B, K) and (S, B, K) -> mean cross-entropy; saves only the gradient of the student's logits."""

    @staticmethod
    def forward(
        ctx: Any, teacher: Tensor, student: Tensor, center: Tensor | float, teacher_temp: float, student_temp: float
    ) -> Tensor:
        """See `dino_loss`."""
        count, dtype = _count(teacher, student), _at_least_float32(student.dtype)
        targets = teacher.to(dtype, copy=True, memory_format=torch.contiguous_format).sub_(center).div_(teacher_temp)
        # A divisor with a dimension takes part in type promotion, which converts low precision to float32.
        gradient = student.new_empty(student.shape, dtype=dtype)
        torch.div(student, student.new_full((1,), student_temp, dtype=dtype), out=gradient)
        total = torch.empty_like(targets[0])
        loss = cross_entropies_(targets, gradient, total) / count
        if ctx.needs_input_grad[1]:
            gradients_(targets, gradient, total, 1 / (student_temp * count))
            ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Scale the gradients that forward kept."""
        (gradient,) = ctx.saved_tensors
        return None, _scaled(gradient, grad, ctx.dtype), None, None, None


class FactoredObjective(torch.autograd.Function):
    """Unit vectors and prototypes of both sides -> mean cross-entropy, with one block of logits in memory.

    Products are computed in `dtype`, everything else in float32 or higher. The targets are subtracted inside the block,
    so there are no more products than in a bare forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        teacher_z: Tensor,
        teacher_prototypes: Tensor,
        student_z: Tensor,
        student_prototypes: Tensor,
        center: Tensor | float,
        teacher_temp: float,
        student_temp: float,
        dtype: torch.dtype,
        block_bytes: int,
    ) -> Tensor:
        """See `dino_loss`."""
        _, _, needs_z, needs_prototypes, *_ = ctx.needs_input_grad
        ctx.dtypes = student_z.dtype, student_prototypes.dtype
        count, views = _count(teacher_z, student_z), (len(teacher_z), len(student_z), 1)
        teacher_prototypes, prototypes = teacher_prototypes.to(dtype), student_prototypes.to(dtype)
        workspace = LogitsWorkspace(views, student_z.shape[1], prototypes, block_bytes)
        scale = -1 / (workspace.gradient_scale * student_temp * count)  # of the products with the negative gradient
        loss = workspace.logits.new_zeros(())
        grad_z = torch.empty_like(student_z, dtype=loss.dtype) if needs_z else None
        grad_prototypes = torch.empty_like(prototypes, dtype=loss.dtype) if needs_prototypes else None
        for samples in workspace.blocks:
            z = student_z[:, samples].to(dtype).flatten(end_dim=1)  # (S b, D)
            teacher, student, total = workspace.split(samples)
            z_teacher = teacher_z[:, samples].to(dtype).flatten(end_dim=1)  # (T b, D)
            workspace.multiply_(teacher, z_teacher, teacher_prototypes, teacher_temp)
            workspace.multiply_(student, z, prototypes, student_temp)
            loss += cross_entropies_(teacher.sub_(center / teacher_temp), student, total[0])
            if needs_z or needs_prototypes:
                gradients_(teacher, student, total[0], -1.0)
                negative = workspace.scale_for_product_(student)  # (S b, K)
            if grad_z is not None:
                grad_z[:, samples] = (negative @ prototypes).to(loss.dtype).mul_(scale).view_as(grad_z[:, samples])
            if grad_prototypes is not None:
                workspace.add_product_(grad_prototypes, negative.T, z, scale, is_first=samples.start == 0)
        ctx.save_for_backward(grad_z, grad_prototypes)
        return loss / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Scale the gradients that forward kept."""
        gradients = [_scaled(kept, grad, dtype) for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return None, None, *gradients, None, None, None, None, None


class LogitsWorkspace:
    """Memory for the logits of one block of samples, within a budget, and the products that fill it.

    Args:
        views: Number of views of each tensor that shares the memory; `split()` returns these tensors.
        samples: Number B of samples in the batch.
        prototypes: Prototypes (K, D), in the type of the products.
        block_bytes: Budget in bytes; a block contains at least one sample.

    Attributes:
        blocks: Slices of samples, all of about the same length.
        logits: Buffer (rows, K) for the logits of the longest block, in float32 or higher.
        low_precision: Buffer (rows, K) for products in a lower precision than `logits`; None if not needed.
        gradient_scale: Factor that keeps float16 gradients from vanishing and their sums from overflowing.
    """

    def __init__(self, views: tuple[int, ...], samples: int, prototypes: Tensor, block_bytes: int) -> None:
        outputs, dtype, sum_dtype = len(prototypes), prototypes.dtype, _at_least_float32(prototypes.dtype)
        is_low = dtype != sum_dtype
        per_sample = outputs * (sum(views) * sum_dtype.itemsize + is_low * max(views) * dtype.itemsize)
        number = math.ceil(samples / max(1, block_bytes // per_sample))
        longest = math.ceil(samples / number)
        self.blocks = [slice(start, min(start + longest, samples)) for start in range(0, samples, longest)]
        self.logits = prototypes.new_empty(sum(views) * longest, outputs, dtype=sum_dtype)
        self.low_precision = prototypes.new_empty(max(views) * longest, outputs) if is_low else None
        self.gradient_scale = 2.0**14 / (max(views) * longest) if is_low else 1.0
        self._views = views

    def split(self, samples: slice) -> tuple[Tensor, ...]:
        """Contiguous memory (views, b, K) for each of `views`, with the b samples of a block."""
        length = samples.stop - samples.start
        memory = self.logits[: sum(self._views) * length].view(-1, length, self.logits.shape[1])
        return torch.split(memory, list(self._views))

    def multiply_(self, out: Tensor, z: Tensor, prototypes: Tensor, temp: float) -> None:
        """`out` (views, b, K) = z (views b, D) times prototypes (K, D) over `temp`."""
        rows = out.flatten(end_dim=1)
        product = rows if self.low_precision is None else self.low_precision[: len(rows)]
        torch.addmm(product, z, prototypes.T, beta=0, alpha=1 / temp, out=product)
        if self.low_precision is not None:
            rows.copy_(product)

    def scale_for_product_(self, values: Tensor) -> Tensor:
        """(views, b, K) -> (views b, K) in the type of the products, times `gradient_scale`."""
        rows = values.flatten(end_dim=1)
        if self.low_precision is None:
            return rows
        return torch.mul(rows, self.gradient_scale, out=self.low_precision[: len(rows)])

    def add_product_(self, total: Tensor, a: Tensor, b: Tensor, scale: float, *, is_first: bool) -> None:
        """`total` += scale a @ b; the first product overwrites `total`."""
        if self.low_precision is None:
            torch.addmm(total, a, b, beta=0 if is_first else 1, alpha=scale, out=total)
        elif is_first:
            torch.mul(a @ b, total.new_full((1,), scale), out=total)  # a dimension makes it promote to float32
        else:
            total.add_(a @ b, alpha=scale)


def _count(teacher: Tensor, student: Tensor) -> int:
    """Number of cross-entropies in the mean: pairs of views times samples."""
    return len(teacher) * (len(student) - 1) * student.shape[1]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scaled(kept: Tensor | None, grad: Tensor, dtype: torch.dtype) -> Tensor | None:
    if kept is None:
        return None
    gradient = (kept * grad if _keeps_graph() else kept.mul_(grad)).to(dtype)
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
            "the DINO loss can be differentiated once: it computes its gradients in forward. For a second derivative, "
            "write the loss out with softmax and log_softmax"
        )
