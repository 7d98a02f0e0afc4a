"""The iBOT loss of masked patches: an efficient implementation, and a plain one for comparison.

Sizes: V views of all images, N patches of a view, M masked patches of all views, K prototypes, D bottleneck width.
"""

import torch
from torch import Tensor

from dino_head._arguments import check_integer, check_number
from dino_head.functional._blocks import objective
from dino_head.functional._outputs import Outputs, as_token_outputs, check_sides, flat_center
from dino_head.functional._workspace import BLOCK_BYTES
from dino_head.prototypes import FactoredLogits

Tokens = Tensor | FactoredLogits | Outputs  # types that public functions and modules accept for masked patches


def ibot_patch_loss(
    teacher_out: Tokens,
    student_out: Tokens,
    weights: Tensor,
    *,
    center: Tensor | float = 0.0,
    teacher_temp: float = 0.07,
    student_temp: float = 0.1,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """Weighted cross-entropy of the masked patches (Zhou et al. 2022, arXiv:2111.07832; DINOv2, arXiv:2304.07193).

        p_n = softmax((teacher_n - center) / teacher_temp),  log q_n = log_softmax(student_n / student_temp)
        loss = sum_n  weights_n  (-sum_k p_nk log q_nk)

    `IBOTPatchLoss` uses weights 1 / (V m), where m is the number of masked patches of the patch's view. Memory,
    precision and gradients are those of `dino_loss`: with `FactoredLogits`, at most one block of logits is in memory
    at a time.

    Args:
        teacher_out: Outputs for the M masked patches: logits (M, K), or FactoredLogits with z (M, D). M may be 0, which
            gives a loss of 0 and gradients of 0.
        student_out: Outputs of the same kind, in the same order.
        weights: Weights (M,) on the device of the outputs; they get no gradient.
        center: Values (K,) or (1, 1, K), or a number, subtracted from the teacher's logits.
        teacher_temp: Temperature of the teacher, > 0.
        student_temp: Temperature of the student, > 0.
        block_bytes: Memory in bytes for one block of logits from FactoredLogits; a block has at least one patch.

    Returns:
        The loss in nats, a scalar.

    Raises:
        ValueError: Kinds, shapes or types that do not match, swapped sides, or a temperature <= 0.
        RuntimeError: A second derivative is computed.

    >>> ibot_patch_loss(torch.zeros(3, 16), torch.zeros(3, 16), torch.full((3,), 1 / 3))  # uniform: ln 16
    tensor(2.7726)
    """
    check_number("teacher_temp", teacher_temp, 0, float("inf"), exclude_minimum=True)
    check_number("student_temp", student_temp, 0, float("inf"), exclude_minimum=True)
    check_integer("block_bytes", block_bytes, 1)
    teacher, student = as_token_outputs(teacher_out), as_token_outputs(student_out)
    check_sides(teacher, student)
    if not isinstance(weights, Tensor) or weights.shape != (student.samples,) or not weights.is_floating_point():
        given = f"{tuple(weights.shape)} in {weights.dtype}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(
            f"weights must be a floating-point tensor with a value for each of M = {student.samples} patches, got "
            f"{given}: IBOTPatchLoss computes them from masks"
        )
    return objective(
        teacher,
        student,
        weights=weights,
        center=flat_center(center, teacher.output_dim),
        teacher_temp=teacher_temp,
        student_temp=student_temp,
        block_bytes=block_bytes,
    )


def reference_ibot_patch_loss(
    teacher: Tensor,
    student: Tensor,
    masks: Tensor,
    *,
    center: Tensor | float = 0.0,
    teacher_temp: float = 0.07,
    student_temp: float = 0.1,
) -> Tensor:
    """`ibot_patch_loss` as the paper writes it: a loop over views, in float64, with autograd's gradients.

    The tests compare `ibot_patch_loss` with it. Logits of all patches (V, N, K), masks (V, N) -> loss in nats.

    >>> reference_ibot_patch_loss(torch.zeros(2, 4, 16), torch.zeros(2, 4, 16), torch.ones(2, 4, dtype=torch.bool))
    tensor(2.7726, dtype=torch.float64)
    """
    loss = torch.zeros((), dtype=torch.float64)
    for teacher_view, student_view, mask in zip(teacher.detach().double(), student.double(), masks, strict=True):
        if mask.any():
            p = ((teacher_view[mask] - center) / teacher_temp).softmax(dim=-1)  # (m, K)
            log_q = (student_view[mask] / student_temp).log_softmax(dim=-1)
            loss = loss - (p * log_q).sum(dim=-1).mean()  # a view without a mask adds 0
    return loss / len(masks)


def patch_weights(masks: Tensor, tokens: int) -> Tensor:
    """Weights 1 / (V m) of the masked patches, m the number of masked patches of the patch's view.

    Args:
        masks: Masks (V, N) or (V, *grid), True where masked.
        tokens: Number M of masked patches in the outputs.

    Returns:
        Weights (M,) on the device of the masks, in the order of patches[masks].

    Raises:
        ValueError: Masks of another type or shape, with another number of masked patches, or with none left visible.
    """
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.dim() < 2:
        given = f"{tuple(masks.shape)} in {masks.dtype}" if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(
            f"masks must be a boolean tensor (V, N) or (V, *grid) of all V views, True where a patch is masked, got "
            f"{given}: make them with random_block_masks(V, grid)"
        )
    weights: Tensor = _opaque_weights(masks.flatten(start_dim=1), tokens)
    return weights


def _weights(masks: Tensor, tokens: int) -> Tensor:
    views, patches = masks.shape
    counts = masks.sum(dim=1)
    total, largest = int(counts.sum()), int(counts.max()) if views else 0
    if total != tokens:
        raise ValueError(
            f"masks {tuple(masks.shape)} mask {total} patches, got outputs of {tokens}: pass the outputs of the masked "
            "patches alone, in the order of patches[masks]"
        )
    if patches and largest == patches:
        full = int((counts == patches).sum())
        raise ValueError(
            f"{full} of {views} views have a mask on each of their {patches} patches, so the student sees nothing of "
            "them: use a lower ratio, or random_block_masks, which leaves some visible"
        )
    shares = 1 / (views * counts.clamp(min=1).float())
    return shares.repeat_interleave(counts, output_size=total)


# Opaque to the compiler, because the checks read values of the masks.
_opaque_weights = torch.library.custom_op("dino_head::patch_weights", _weights, mutates_args=())


@_opaque_weights.register_fake
def _empty_weights(masks: Tensor, tokens: int) -> Tensor:
    return masks.new_empty(tokens, dtype=torch.float32)
