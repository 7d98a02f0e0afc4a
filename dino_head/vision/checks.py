"""A check of backbone, heads and loss before training starts.

Sizes: B samples, C channels, H and W pixels, N patches, D features.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dino_head import DINOLoss, DINOProjectionHead, FactoredLogits
from dino_head._pooling import how_to_pool, is_pair, shapes_of


@torch.no_grad()
def check_backbone(
    backbone: nn.Module,
    head: DINOProjectionHead,
    views: Sequence[Tensor],
    loss: DINOLoss | None = None,
    *,
    patch_head: DINOProjectionHead | None = None,
) -> None:
    """Raise an error before training starts if backbone, heads and loss do not fit the views and each other.

    All of them are called in evaluation mode; neither they nor random states change. Call it under the autocast of the
    run, with views in the dtype of the weights. If the backbone returns class and patch tokens, it must have a
    `patch_size` and take masks: a masked patch must change the outputs of its own image, and of no other.

    Args:
        backbone: Backbone for the views.
        head: Projection head for the features, or for the class tokens.
        views: Views (B, C, H, W); one of each size is passed on, and the backbone gets masks for the first.
        loss: Loss for the outputs of the head; None to check only backbone and heads. With Sinkhorn, all processes have
            to call it.
        patch_head: Projection head for patch tokens, which the backbone then must return; it may be `head`.

    Raises:
        ValueError: If one of them raises an error, or the backbone's output is neither (B, head.input_dim) nor a pair
            of this and (B, N, D), or masks do not act as they should.
    """
    parts = [part for part in (backbone, head, loss, patch_head) if part is not None]
    modes = {module: module.training for part in parts for module in part.modules()}
    try:
        for part in parts:
            part.eval()
        with torch.random.fork_rng(sorted({view.get_device() for view in views if view.is_cuda})):
            for view in {view.shape[2:]: view for view in views}.values():
                output = _output(backbone, view)
                _check_features(output[0] if is_pair(output) else output, head, view, loss)
                if is_pair(output):
                    _check_patches(backbone, output[1], patch_head, view)
                elif patch_head is not None:
                    raise ValueError(
                        "patch_head needs a backbone that returns class tokens (B, D) and patch tokens (B, N, D), got "
                        f"{shapes_of(output)}: use dino_head.vision.TokenFeatures"
                    )
            if is_pair(output):
                _check_masks(backbone, views[0])
    finally:
        for module, mode in modes.items():
            module.training = mode


def _output(backbone: nn.Module, view: Tensor) -> Any:
    try:
        return backbone(view)
    except Exception as error:  # of any kind
        raise ValueError(
            f"the backbone cannot take views of {_size(view)} ({type(error).__name__}: {error}): make their size a "
            "multiple of its patch size, let it interpolate its position embeddings (transformers: "
            "interpolate_pos_encoding=True; timm: dynamic_img_size=True), and convert them from "
            f"{view.dtype} to the type of its weights, if it differs"
        ) from error


def _size(view: Tensor) -> str:
    return " x ".join(map(str, view.shape[2:]))


def _check_features(features: Any, head: DINOProjectionHead, view: Tensor, loss: DINOLoss | None) -> None:
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(view):
        raise ValueError(
            f"the backbone must return features ({len(view)}, D) for {len(view)} views of {_size(view)}, got "
            f"{how_to_pool(features)}"
        )
    z, prototypes = _check_head(head, features, "features", "head")
    if loss is not None:
        two_views = FactoredLogits(torch.stack([z, z]), prototypes)
        loss.forward(two_views, two_views)  # without hooks, which measure the calls during training


def _check_head(head: DINOProjectionHead, features: Tensor, kind: str, name: str) -> FactoredLogits:
    width = features.shape[1]
    if width != head.input_dim:
        raise ValueError(
            f"the backbone returns {width} {kind}, but the {name} expects {head.input_dim}: use "
            f"DINOProjectionHead(input_dim={width}, ...)"
        )
    try:
        return head.factored_logits(features)
    except RuntimeError as error:
        raise ValueError(
            f"the {name} cannot take the backbone's {kind} {tuple(features.shape)} in {features.dtype} "
            f"({type(error).__name__}: {error}): convert backbone and {name} to one type"
        ) from error


def _check_patches(backbone: nn.Module, patches: Tensor, patch_head: DINOProjectionHead | None, view: Tensor) -> None:
    expected = (len(view), _patch_count(backbone, view))
    if patches.shape[:2] != expected:
        raise ValueError(
            f"the backbone must return patch tokens ({expected[0]}, {expected[1]}, D) for {len(view)} views of "
            f"{_size(view)} in patches of {backbone.patch_size}, got {tuple(patches.shape)}: return one token for each "
            "patch, and no class or register token among them"
        )
    if patch_head is not None:
        _check_head(patch_head, patches[:, 0], "features of a patch", "patch_head")


def _patch_count(backbone: nn.Module, view: Tensor) -> int:
    sides, patch_size = view.shape[2:], getattr(backbone, "patch_size", None)
    is_tuple = isinstance(patch_size, tuple) and all(isinstance(size, int) and size > 0 for size in patch_size)
    if not is_tuple or len(patch_size) != len(sides):  # type: ignore[arg-type]
        raise ValueError(
            "a backbone that returns patch tokens must have the attribute patch_size, a tuple with the size in pixels "
            f"along each of the {len(sides)} axes of its views, such as {(16,) * len(sides)}, got {patch_size!r}"
        )
    return math.prod(side // size for side, size in zip(sides, patch_size, strict=True))  # type: ignore[arg-type]


def _check_masks(backbone: nn.Module, view: Tensor) -> None:
    noise = torch.randn_like(view)  # the mask token can equal the embedding of a black patch
    of_all = torch.zeros(len(view), _patch_count(backbone, view), dtype=torch.bool, device=view.device)
    of_all[:, 0] = True
    of_first = of_all.clone()
    of_first[1:] = False
    unmasked = backbone(noise)
    by_none, by_all, by_first = (
        _change(unmasked, _masked(backbone, noise, masks)) for masks in (torch.zeros_like(of_all), of_all, of_first)
    )
    # Not zero, because rounding may depend on the batch.
    if (by_none > 0.01 * by_all).any():
        raise ValueError(
            "the backbone changes its outputs for masks that are False everywhere: True means masked, so use ~masks if "
            "its own masks are True for the visible patches"
        )
    if (by_first[1:] > 0.01 * by_all[1:]).any():
        raise ValueError(
            "the backbone uses the mask of one image for another: a mask of the first image changes the outputs of "
            "others. Row b of the masks (B, N) is for image b"
        )
    if not by_all.all() or not by_first[0]:
        raise ValueError(
            "the backbone ignores masks: a masked patch does not change the outputs of its image. Replace the "
            "embeddings of masked patches by a mask token"
        )


def _masked(backbone: nn.Module, view: Tensor, masks: Tensor) -> Any:
    try:
        return backbone(view, masks)
    except Exception as error:  # of any kind
        raise ValueError(
            f"the backbone cannot take masks {tuple(masks.shape)} for views of {_size(view)} "
            f"({type(error).__name__}: {error}): define forward(images, masks=None) with bool masks (B, N), or use "
            "dino_head.vision.TokenFeatures"
        ) from error


def _change(unmasked: Any, masked: Any) -> Tensor:
    """The largest change of a value in each image (B,)."""
    if not is_pair(masked) or shapes_of(masked) != shapes_of(unmasked):
        raise ValueError(
            f"the backbone must return the same shapes with masks as without, {shapes_of(unmasked)}, got "
            f"{shapes_of(masked)}: replace masked patches instead of leaving them out"
        )
    before, after = (torch.cat([part.flatten(1) for part in pair], dim=1) for pair in (unmasked, masked))
    if not after.isfinite().all():
        raise ValueError("the backbone's outputs for masked images are not finite: check its mask token")
    return (after - before).abs().amax(dim=1)
