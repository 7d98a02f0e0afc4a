"""Views of several resolutions through one backbone.

Sizes: V views, T of them with masks, B samples, C channels, H and W pixels, N patches, D feature width.
"""

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from dino_head._pooling import how_to_pool, is_pair, shapes_of


@overload
def multicrop_forward(module: Callable[[Tensor], Tensor], views: Sequence[Tensor], masks: None = None) -> Tensor: ...


@overload
def multicrop_forward(
    module: Callable[..., tuple[Tensor, Tensor]], views: Sequence[Tensor], masks: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]: ...


def multicrop_forward(
    module: Callable[..., Any], views: Sequence[Tensor], masks: Tensor | None = None
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Run `module` once for each resolution among the views.

    Views of one resolution form one batch: the module runs twice for two global and eight local crops, and batch norm
    computes its statistics over all views of a resolution (as in Caron et al. 2021, appendix D and their code).

    Args:
        module: Function that maps (B, C, H, W), or inputs of any other trailing shape, to features (B, D) or to a pair
            of class tokens (B, D) and patch tokens (B, N, D).
        views: V tensors (B, C, H, W); H and W may differ between them.
        masks: Masks of the patches of the first T views, True = masked: bool (T * B, N) or (T * B, *grid), all samples
            of one view before those of the next. These views must have one resolution, for which
            `module(inputs, masks)` is called with the masks on the inputs' device; other resolutions run without masks.

    Returns:
        Features (V, B, D) in the order of the views. If the module returns pairs: class tokens (V, B, D), and a list
        with the patch tokens (B, N, D) of each view.

    Raises:
        ValueError: A single tensor or other values instead of a list of tensors, views with different numbers of
            samples, or outputs of `module` that do not have one row for each input, or differ in shape. Masks that are
            not bool, or do not fit the views or the patch tokens.

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
    rows = None if masks is None else _rows(masks, views)
    features: dict[int, Tensor] = {}
    patches: dict[int, Tensor] = {}
    for indices in groups.values():
        inputs = torch.cat([views[index] for index in indices])
        output = module(inputs) if rows is None or 0 not in indices else _masked(module, inputs, rows)
        for outputs, batch in zip((features, patches), output if is_pair(output) else (output,), strict=False):
            if not isinstance(batch, Tensor):
                raise ValueError(f"the module must return a tensor of features (B, D), got {how_to_pool(batch)}")
            if not batch.ndim or len(batch) != len(inputs):
                raise ValueError(
                    f"the module must return one row for each of its {len(inputs)} inputs, got shape "
                    f"{tuple(batch.shape)}: keep the samples as its first dimension"
                )
            outputs.update(zip(indices, batch.chunk(len(indices)), strict=True))
    output_shapes = list(dict.fromkeys(tuple(features[index].shape) for index in range(len(views))))
    if len(output_shapes) > 1:
        raise ValueError(
            f"the module must return features of one shape for views of all sizes, got {output_shapes}, "
            f"which are {how_to_pool(features[0])}"
        )
    stacked = torch.stack([features[index] for index in range(len(views))])  # (V, B, D)
    if not patches:
        return stacked
    if len(patches) < len(views):
        raise ValueError(
            f"the module must return patch tokens for views of all sizes or none, got them for {len(patches)} of "
            f"{len(views)} views: return a pair whether or not masks are given"
        )
    return stacked, [patches[index] for index in range(len(views))]


def _rows(masks: Tensor, views: Sequence[Tensor]) -> Tensor:
    """Masks (T * B, N) or (T * B, *grid) of the first T views -> (T * B, N)."""
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.ndim < 2:
        given = f"{tuple(masks.shape)} in {masks.dtype}" if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"masks must be bool (views * B, N) or (views * B, *grid), True = masked, got {given}")
    samples = len(views[0])
    if len(masks) not in range(samples, samples * len(views) + 1, max(1, samples)):
        raise ValueError(
            f"masks must have one row for each sample of the first views, {samples} for one view to "
            f"{samples * len(views)} for all {len(views)}, got shape {tuple(masks.shape)}"
        )
    masked = views[: len(masks) // max(1, samples)]
    shapes = list(dict.fromkeys(tuple(view.shape[1:]) for view in masked))
    if len(shapes) > 1:
        raise ValueError(
            f"views with masks must have one resolution, got {shapes} for the first {len(masked)} views, "
            f"to which {len(masks)} rows of masks belong: order the views by resolution, or pass fewer rows"
        )
    return masks.flatten(1)


def _masked(module: Callable[..., Any], inputs: Tensor, rows: Tensor) -> Any:
    """Run `module` with masks; further views of the same resolution have no masked patch."""
    unmasked = rows.new_zeros(len(inputs) - len(rows), rows.shape[1])
    output = module(inputs, torch.cat([rows, unmasked]).to(inputs.device, non_blocking=True))
    if not is_pair(output):
        raise ValueError(
            "with masks, the module must return a pair of class tokens (B, D) and patch tokens (B, N, D), got "
            f"{shapes_of(output)}: use dino_head.vision.TokenFeatures"
        )
    if output[1].shape[1] != rows.shape[1]:
        raise ValueError(
            f"masks have {rows.shape[1]} patches for views {tuple(inputs.shape[1:])}, but the module returns "
            f"{output[1].shape[1]} patch tokens: make the masks for its grid, the views' size // patch size"
        )
    return output
