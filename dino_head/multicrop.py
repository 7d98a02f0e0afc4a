"""Views of several resolutions through one backbone.

Sizes: V views, B samples, C channels, H and W pixels, D feature width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def multicrop_forward(module: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> Tensor:
    """Run `module` once for each resolution among the views.

    Views of one resolution form one batch: the module runs twice for two global and eight local crops, and batch norm
    computes its statistics over all views of a resolution (as in Caron et al. 2021, appendix D and their code).

    Args:
        module: Function from (N, C, H, W), or from inputs of any other trailing shape, to (N, D).
        views: V tensors (B, C, H, W); H and W may differ between them.

    Returns:
        Outputs (V, B, D) in the order of the views.

    Raises:
        ValueError: No view, or views with different numbers of samples.

    >>> views = [torch.ones(4, 3, 16, 16), torch.ones(4, 3, 8, 8), torch.ones(4, 3, 16, 16)]
    >>> multicrop_forward(lambda x: x.mean(dim=(2, 3)), views).shape
    torch.Size([3, 4, 3])
    """
    if not views:
        raise ValueError("views must contain at least one tensor (B, C, H, W), got an empty sequence")
    if len({len(view) for view in views}) > 1:
        shapes = [tuple(view.shape) for view in views]
        raise ValueError(f"every view must contain the same B samples, got shapes {shapes}")
    groups: dict[torch.Size, list[int]] = {}
    for index, view in enumerate(views):
        groups.setdefault(view.shape[1:], []).append(index)
    outputs: dict[int, Tensor] = {}
    for indices in groups.values():
        batch = module(torch.cat([views[index] for index in indices]))  # (len(indices) * B, D)
        outputs.update(zip(indices, batch.chunk(len(indices)), strict=True))
    return torch.stack([outputs[index] for index in range(len(views))])  # (V, B, D)
