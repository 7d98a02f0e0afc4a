"""Time and memory of a forward and a backward of the last layer and the DINO loss, beside the bare matrix products.

    python benchmarks/objective.py                               # the table in docs/benchmarks.md
    python benchmarks/objective.py --device cuda --bf16 --samples 64

Every variant gets unit vectors of 2 global and 8 local views and the prototypes of both sides, and computes the
student's gradients (see measuring.py).
"""

from typing import Any

import measuring
import torch
from measuring import STUDENT_TEMP, TEACHER_TEMP, Side
from torch import Tensor
from torch.nn import functional as F

from dino_head import dino_loss

TEACHER_VIEWS, VIEWS = 2, 10


def floor(teacher: Side, student: Side, _: Tensor) -> Tensor:
    """The matrix products alone."""
    return measuring.bare_products(teacher, student)


def usual_loss(teacher: Tensor, student: Tensor, center: Tensor) -> Tensor:
    """Stacked views, softmax and log-softmax, and an einsum for all pairs."""
    teacher = torch.stack(teacher.flatten(0, 1).chunk(TEACHER_VIEWS))
    student = torch.stack(student.flatten(0, 1).chunk(VIEWS))
    targets = F.softmax((teacher - center) / TEACHER_TEMP, dim=-1)
    log_q = F.log_softmax(student / STUDENT_TEMP, dim=-1)
    entropies = -torch.einsum("tbk,sbk->ts", targets, log_q).fill_diagonal_(0)
    return entropies.sum() / (entropies.numel() - entropies.diagonal().numel()) / teacher.shape[1]


def pairwise_loss(teacher: Tensor, student: Tensor, center: Tensor) -> Tensor:
    """A loop over pairs of views, as in the authors' code, which computes log-softmax for each pair."""
    targets = F.softmax((teacher.flatten(0, 1) - center[0]) / TEACHER_TEMP, dim=-1)
    views = (student.flatten(0, 1) / STUDENT_TEMP).chunk(VIEWS)
    losses = []
    for t, target in enumerate(targets.chunk(TEACHER_VIEWS)):
        for s, view in enumerate(views):
            if s != t:
                losses.append(torch.sum(-target * F.log_softmax(view, dim=-1), dim=-1).mean())
    return torch.stack(losses).mean()


def our_loss(teacher: Any, student: Any, center: Tensor, **options: int) -> Tensor:
    """The loss of this library; `options` may set block_bytes."""
    return dino_loss(teacher, student, center=center, teacher_temp=TEACHER_TEMP, student_temp=STUDENT_TEMP, **options)


def make(outputs: int, batch: int, device: str) -> measuring.Case:
    """Random inputs of both sides and a center."""
    torch.manual_seed(0)
    teacher, student = measuring.sides(outputs, device, (TEACHER_VIEWS, batch), (VIEWS, batch))
    return teacher, student, 0.01 * torch.randn(1, 1, outputs, device=device)


VARIANTS: dict[str, measuring.Variant] = {
    "floor": floor,
    "usual": measuring.on_logits(usual_loss),
    "pairwise": measuring.on_logits(pairwise_loss),
    "logits": measuring.on_logits(our_loss),
    "factored": our_loss,
    "factored frozen": measuring.frozen(our_loss),
    "factored bf16": measuring.in_bf16(our_loss),
}
# The teacher's logits are written and read; the student's are written, read, overwritten by their gradient, and read by
# two products.
DINO = measuring.Objective("DINO", make, "pairwise", VARIANTS, 2 * TEACHER_VIEWS + 5 * VIEWS)


def main() -> None:
    """Print the table."""
    sizes = {"prototypes": [4096, 65_536, 262_144], "samples": [32, 128]}
    measuring.main(__file__, __doc__, [DINO], **sizes, meaning="images per batch")


if __name__ == "__main__":
    main()
