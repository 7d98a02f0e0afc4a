"""Sinkhorn-Knopp targets, expressed as a center.

Sizes: B samples, T teacher views, K prototypes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dino_head._arguments import check_integer, check_number
from dino_head.functional._outputs import Logits, Outputs, as_outputs
from dino_head.functional._workspace import BLOCK_BYTES, LN2, LogitsWorkspace, at_least_float32


@torch.no_grad()
def sinkhorn_center(
    teacher_out: Logits,
    teacher_temp: float,
    *,
    iterations: int = 3,
    reduce: Callable[[Tensor], Tensor] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """Center that spreads a batch evenly over the prototypes (Caron et al. 2020, arXiv:2006.09882; DINOv2).

    Sinkhorn-Knopp scales exp(teacher / teacher_temp) so that, in turn, all prototypes and all samples get equal shares.
    In the log domain, with M = teacher / teacher_temp and potentials f of the prototypes and g of all T B samples:

        g = 0;  then in each iteration  f_k = logsumexp_n(M_nk - g_n),  g_n = logsumexp_k(M_nk - f_k)

    The assignment is exp(M_nk - f_k - g_n) = softmax_k((teacher_nk - c_k) / teacher_temp) with c = teacher_temp f, the
    distribution of a teacher with the center c. It is finite at any scale of the logits.

    Args:
        teacher_out: Outputs of the teacher, as for `dino_loss`.
        teacher_temp: Temperature, > 0.
        iterations: Number of iterations, >= 1.
        reduce: Function that maps the log-sums (K,) of this process to the log-sums of all processes; None for one
            process.
        block_bytes: Memory in bytes for one block of logits, as for `dino_loss`; FactoredLogits are multiplied again in
            each iteration.

    Returns:
        The center c for `dino_loss(..., center=c)`: (K,), in float32 or higher.

    Raises:
        ValueError: Kinds, shapes or types that do not match, a temperature <= 0, or no iteration.

    >>> sinkhorn_center(torch.zeros(2, 3, 4), teacher_temp=0.1).shape
    torch.Size([4])
    """
    check_number("teacher_temp", teacher_temp, 0, float("inf"), exclude_minimum=True)
    check_integer("iterations", iterations, 1)
    teacher = as_outputs(teacher_out).detach()
    log_sums = _opaque_log_sums if torch.compiler.is_compiling() else _log_sums
    potential: Tensor | None = None  # f; g follows from it
    for _ in range(iterations):
        sums: Tensor = log_sums(*teacher, potential, float(teacher_temp), teacher.product_dtype, block_bytes)
        potential = sums if reduce is None else reduce(sums)
    assert potential is not None
    return potential * teacher_temp


def _log_sums(
    rows: Tensor,
    prototypes: Tensor | None,
    potential: Tensor | None,
    temp: float,
    dtype: torch.dtype,
    block_bytes: int,
) -> Tensor:
    """Logsumexp over the samples of M_nk - g_n, (K,), in float32 or higher; -inf without samples."""
    sums: Tensor | None = None
    with torch.autocast(rows.device.type, enabled=False):
        for logits, spare in _blocks_in_base_2(Outputs(rows, prototypes), temp, dtype, block_bytes):  # (T b, K) each
            if potential is not None:
                logits.sub_(_log2_of_sum(torch.sub(logits, potential / LN2, out=spare), spare, dim=1))
            of_block = _log2_of_sum(logits, spare, dim=0).squeeze(0) * LN2
            sums = of_block if sums is None else torch.logaddexp(sums, of_block)
    if sums is None:
        sums = rows.new_full((Outputs(rows, prototypes).output_dim,), -torch.inf, dtype=at_least_float32(dtype))
    return sums


# Opaque to the compiler, because the number of blocks depends on the number of samples.
_opaque_log_sums = torch.library.custom_op("dino_head::log_sums", _log_sums, mutates_args=())


@_opaque_log_sums.register_fake
def _empty_log_sums(rows: Tensor, prototypes: Tensor | None, *options: Any) -> Tensor:
    return rows.new_empty(Outputs(rows, prototypes).output_dim, dtype=at_least_float32(options[2]))


def _log2_of_sum(values: Tensor, spare: Tensor, dim: int) -> Tensor:
    """Logarithm of the sum of 2^values, all in base 2; `spare`, which may be `values`, is overwritten."""
    peaks = values.amax(dim=dim, keepdim=True)
    return torch.sub(values, peaks, out=spare).exp2_().sum(dim=dim, keepdim=True).log2_().add_(peaks)


def _blocks_in_base_2(
    teacher: Outputs, temp: float, dtype: torch.dtype, block_bytes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits over temperature and ln 2 (T b, K), in float32 or higher, block by block, and memory of this size.

    Each block overwrites the previous one. (Powers of 2 take half as long as powers of e.)
    """
    temp *= LN2
    if teacher.prototypes is None:
        if teacher.samples:
            logits = teacher.rows.flatten(end_dim=1).to(at_least_float32(teacher.rows.dtype)) / temp
            yield logits, torch.empty_like(logits)
        return
    prototypes = teacher.prototypes.to(dtype)
    workspace = LogitsWorkspace((teacher.views, teacher.views), teacher.samples, prototypes, block_bytes)
    for samples in workspace.blocks:
        logits, spare = workspace.split(samples)
        z = teacher.rows[:, samples].to(dtype).flatten(end_dim=1)
        workspace.multiply_(logits, z, prototypes, temp)
        yield logits.flatten(end_dim=1), spare.flatten(end_dim=1)
