"""Time and memory of a forward and a backward of the last layer and the iBOT loss, beside the bare matrix products.

    python benchmarks/patches.py                               # the table in docs/benchmarks.md
    python benchmarks/patches.py --device cuda --bf16

Every variant gets unit vectors of M masked patches and the prototypes of both sides, and computes the student's
gradients (see measuring.py). By default, M is what block masks of DINOv2 hide of 64 images with 2 x 14 x 14 patches.
With Sinkhorn centering of 3 iterations, the teacher's logits are needed four times, so there are seven products.
"""

from typing import Any

import measuring
import torch
from measuring import STUDENT_TEMP, TEACHER_TEMP, Side
from torch import Tensor
from torch.nn import functional as F

from dino_head import FactoredLogits, ibot_patch_loss
from dino_head.functional.sinkhorn import sinkhorn_center

ITERATIONS = 3


def floor(teacher: Side, student: Side, *_: Tensor) -> Tensor:
    """The matrix products alone."""
    return measuring.bare_products(teacher, student)


def sinkhorn_floor(teacher: Side, student: Side, *_: Tensor) -> Tensor:
    """The matrix products alone, with the teacher's logits once more for each iteration."""
    return measuring.bare_products(teacher, student, of_teacher=1 + ITERATIONS)


def entropy(targets: Tensor, student: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropies of probabilities and logits (M, K)."""
    log_q = F.log_softmax(student / STUDENT_TEMP, dim=-1)
    return -(weights * (targets * log_q).sum(dim=-1)).sum()


def usual_loss(teacher: Tensor, student: Tensor, center: Tensor, weights: Tensor) -> Tensor:
    """Softmax and log-softmax of all logits."""
    return entropy(F.softmax((teacher - center) / TEACHER_TEMP, dim=-1), student, weights)


def usual_sinkhorn_loss(teacher: Tensor, student: Tensor, _center: Tensor, weights: Tensor) -> Tensor:
    """Exponentials of all logits, divided by their sums over patches and over prototypes in turn."""
    targets = (teacher / TEACHER_TEMP).exp()
    for _ in range(ITERATIONS):
        targets /= targets.sum(dim=0)
        targets /= targets.sum(dim=1, keepdim=True)
    return entropy(targets, student, weights)


def our_loss(teacher: Any, student: Any, center: Tensor, weights: Tensor, **options: Any) -> Tensor:
    """The loss of this library; `options` may set block_bytes."""
    options |= {"center": center, "teacher_temp": TEACHER_TEMP, "student_temp": STUDENT_TEMP}
    return ibot_patch_loss(teacher, student, weights, **options)


def our_sinkhorn_loss(teacher: Side, student: Side, _center: Tensor, weights: Tensor, **options: Any) -> Tensor:
    """The same with the center of `sinkhorn_center`."""
    one_view = FactoredLogits(teacher.z[None], teacher.prototypes)
    center = sinkhorn_center(one_view, TEACHER_TEMP, iterations=ITERATIONS, **options)
    return our_loss(teacher, student, center, weights, **options)


def make(outputs: int, patches: int, device: str) -> measuring.Case:
    """Random inputs of both sides, a center, and weights whose sum is 1."""
    torch.manual_seed(0)
    teacher, student = measuring.sides(outputs, device, (patches,), (patches,))
    weights = torch.rand(patches, device=device)
    return teacher, student, 0.01 * torch.randn(outputs, device=device), weights / weights.sum()


VARIANTS: dict[str, measuring.Variant] = {
    "floor": floor,
    "usual": measuring.on_logits(usual_loss),
    "factored": our_loss,
    "factored frozen": measuring.frozen(our_loss),
    "factored bf16": measuring.in_bf16(our_loss),
}
SINKHORN_VARIANTS: dict[str, measuring.Variant] = {
    "floor": sinkhorn_floor,
    "usual": measuring.on_logits(usual_sinkhorn_loss),
    "factored": our_sinkhorn_loss,
}
IBOT = measuring.Objective("iBOT", make, "usual", VARIANTS, 2 + 5)
SINKHORN = measuring.Objective("iBOT, Sinkhorn", make, "usual", SINKHORN_VARIANTS, 2 * (1 + ITERATIONS) + 5)


def main() -> None:
    """Print the table."""
    sizes = {"prototypes": [65_536, 131_072], "samples": [3726]}
    measuring.main(__file__, __doc__, [IBOT, SINKHORN], **sizes, meaning="masked patches")


if __name__ == "__main__":
    main()
