"""Views of several resolutions through one backbone.

Sizes: V views, B samples, C channels, H and W pixels, D feature width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dino_head._pooling import how_to_pool


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
        ValueError: A single tensor or other values instead of a list of tensors, views with different numbers of
            samples, or outputs of `module` that are not tensors with one row for each input, or differ in shape.

    >>> views = [torch.ones(4, 3, 16, 16), torch.ones(4, 3, 8, 8), torch.ones(4, 3, 16, 16)]
    >>> multicrop_forward(lambda x: x.mean(dim=(2, 3)), views).shape
    torch.Size([3, 4, 3])
    """
    if isinstance(views, Tensor):
        raise ValueError(
            f"views must be a list of V tensors (B, C, H, W), got a single tensor of shape {tuple(views.shape)}: pass "
            "[view_1, view_2, ...], or views.unbind() if its first dimension is the V views"
        )
    if not views:
        raise ValueError("views must contain at least one tensor (B, C, H, W), got an empty sequence")
    if not all(isinstance(view, Tensor) and view.ndim for view in views):
        raise ValueError(
            f"views must be tensors (B, C, H, W), got {[type(view).__name__ for view in views]}: pass only the views"
        )
    if len({len(view) for view in views}) > 1:
        shapes = [tuple(view.shape) for view in views]
        raise ValueError(f"every view must contain the same B samples, got shapes {shapes}")
    groups: dict[torch.Size, list[int]] = {}
    for index, view in enumerate(views):
        groups.setdefault(view.shape[1:], []).append(index)
    outputs: dict[int, Tensor] = {}
    for indices in groups.values():
        inputs = torch.cat([views[index] for index in indices])
        batch = module(inputs)  # (len(indices) * B, D)
        if not isinstance(batch, Tensor):
            raise ValueError(f"the module must return a tensor of features (N, D), got {how_to_pool(batch)}")
        if not batch.ndim or len(batch) != len(inputs):
            raise ValueError(
                f"the module must return features (N, D) for N = {len(inputs)} inputs, got shape {tuple(batch.shape)}: "
                "keep the samples as its first dimension"
            )
        outputs.update(zip(indices, batch.chunk(len(indices)), strict=True))
    output_shapes = list(dict.fromkeys(tuple(outputs[index].shape) for index in range(len(views))))
    if len(output_shapes) > 1:
        raise ValueError(
            f"the module must return features of one shape for views of all sizes, got {output_shapes}, "
            f"which are {how_to_pool(outputs[0])}"
        )
    return torch.stack([outputs[index] for index in range(len(views))])  # (V, B, D)
