"""Sinkhorn-Knopp targets, expressed as a center.

Sizes: B samples, T teacher views, K prototypes.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dino_head._arguments import check_integer, check_number
from dino_head.functional._outputs import Logits, Outputs, as_outputs
from dino_head.functional._workspace import BLOCK_BYTES, LogitsWorkspace


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
    teacher = as_outputs(teacher_out)
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


def _blocks_over_temperature(teacher: Outputs, temp: float, block_bytes: int) -> Iterator[Tensor]:
    """Logits over temperature (T b, K), in float32 or higher, block by block; each overwrites the previous one."""
    if teacher.prototypes is None:
        yield teacher.rows.flatten(end_dim=1).to(torch.promote_types(teacher.rows.dtype, torch.float32)) / temp
        return
    prototypes = teacher.prototypes.to(teacher.product_dtype)
    with torch.autocast(prototypes.device.type, enabled=False):
        workspace = LogitsWorkspace((teacher.views,), teacher.samples, prototypes, block_bytes)
        for samples in workspace.blocks:
            (logits,) = workspace.split(samples)
            z = teacher.rows[:, samples].to(prototypes.dtype).flatten(end_dim=1)
            workspace.multiply_(logits, z, prototypes, temp)
            yield logits.flatten(end_dim=1)
