"""Parameter groups for optimizers."""

from typing import Any

from torch import nn

from dino_head._arguments import check_number


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group trainable parameters for an optimizer: matrices with weight decay, everything else without.

    Biases, the scales and offsets of norms and all other one-dimensional parameters are not decayed, as in the
    authors' code (arXiv:2104.14294). Neither is `weight_g`, the norms of the prototypes, because it is a scale; the
    authors decay it if it is trainable.

    Args:
        module: Module whose trainable parameters are grouped, each once.
        weight_decay: Weight decay of the matrices, >= 0.

    Returns:
        At most two groups, none of them empty. Groups of several modules can be joined and extended with options:
        `[*parameter_groups(backbone, 0.04), *({**group, "lr": 1e-4} for group in parameter_groups(head, 0.04))]`.

    Raises:
        ValueError: A negative weight decay, or no trainable parameter.

    >>> [(len(group["params"]), group["weight_decay"]) for group in parameter_groups(nn.Linear(4, 2), 0.04)]
    [(1, 0.04), (1, 0.0)]
    """
    check_number("weight_decay", weight_decay, 0, float("inf"))
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim > 1 and name.split(".")[-1] != "weight_g"
            (matrices if is_decayed else others).append(parameter)
    if not matrices and not others:
        raise ValueError(
            f"{type(module).__name__} has no trainable parameter: pass the student, or call "
            "module.requires_grad_(True) (FreezeLastLayerCallback does the freezing)"
        )
    groups = [{"params": matrices, "weight_decay": float(weight_decay)}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
