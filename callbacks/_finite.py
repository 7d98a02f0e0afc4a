"""Why a loss is not finite, in words."""

from typing import Any

import torch
from torch import nn

from dino_head.functional import stacked
from dino_head.prototypes import FactoredLogits


@torch.no_grad()
def explain(outputs: tuple[Any, Any], sides: tuple[list[nn.Module], list[nn.Module]]) -> str:
    """Outputs and modules of (teacher, student) -> which side is not finite, the likely cause and the remedy."""
    broken = [name for name, out in zip(("teacher", "student"), outputs, strict=True) if not _is_finite(out)]
    weights = [
        name
        for name, modules in zip(("teacher", "student"), sides, strict=True)
        if not all(parameter.isfinite().all() for module in modules for parameter in module.parameters())
    ]
    if weights:
        return (
            f"the weights of the {' and the '.join(weights)} hold NaN or inf, so an earlier step was too large: lower "
            "the learning rate, warm it up for longer or clip gradients, and go on from the last good checkpoint"
        )
    if len(broken) == 2:
        return (
            "the outputs of teacher and student are not finite while their weights are: images or augmentation hold "
            "NaN or inf, or the precision overflows (use bf16 in place of fp16)"
        )
    if broken:
        return (
            f"the outputs of the {broken[0]} are not finite while its weights and the other side are: look at what "
            f"only the {broken[0]} sees (views, drop path, its own normalisation), or at the precision"
        )
    return "the outputs of both sides are finite: logits over temperature overflow, use a higher temperature"


def _is_finite(out: Any) -> bool:
    out = stacked(out)
    return all(bool(tensor.isfinite().all()) for tensor in (out if isinstance(out, FactoredLogits) else (out,)))
