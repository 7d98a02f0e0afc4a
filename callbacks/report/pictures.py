"""Samples for the report, and their pictures: thumbnails, principal components, maps of patches.

Sizes: B images, C channels, H and W pixels, N samples or tokens, D features, h and w patches.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from dino_head.callbacks._features import features_of, some_batches, split
from dino_head.metrics._neighbours import check_finite

THUMBNAIL_PIXELS = 96  # on the longer side
KEPT_INPUTS = 6  # samples, for maps of their patches


class Samples(NamedTuple):
    """Features (N, D), labels (N,) if any, pictures (N, h, w, 3) if the inputs are images, and the first inputs."""

    features: Tensor
    labels: Tensor | None
    pictures: Tensor | None
    inputs: Tensor | None  # on the device


def take_samples(
    trainer: Trainer, pl_module: LightningModule, module: nn.Module, loader: Iterable[Any], max_samples: int
) -> Samples:
    """Compute features and thumbnails of some samples of a loader, with or without labels, on the CPU.

    Raises:
        ValueError: The loader has no batch, or features are not (B, D) or not finite.
    """
    features, labels, pictures = [], [], []
    first: Tensor | None = None
    for batch in some_batches(loader, max_samples):
        try:
            inputs, of_batch, _ = split(batch)
            labels.append(of_batch.cpu())
        except ValueError:
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        features.append(features_of(pl_module, trainer, module, inputs).cpu())
        pictures.append(thumbnails(inputs))
        if first is None and isinstance(inputs, Tensor):
            first = inputs[:KEPT_INPUTS].to(pl_module.device)
    if not features:
        raise ValueError("there is nothing to show: a loader yielded no batch")
    check_finite("features", torch.cat(features))
    shapes = {None if part is None else part.shape[1:] for part in pictures}
    return Samples(
        torch.cat(features),
        torch.cat(labels) if len(labels) == len(features) else None,
        torch.cat(pictures) if len(shapes) == 1 and None not in shapes else None,  # type: ignore[arg-type]
        first,
    )


def thumbnails(inputs: Any) -> Tensor | None:
    """Images (B, C, H, W) or volumes (B, C, depth, H, W) -> (B, h, w, 3) in [0, 1], each on its own scale; else None.

    Volumes are shown by their middle slice, 2 channels by the first, and more than 3 by the first three.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() not in (4, 5) or not inputs.shape[1]:
        return None
    images = inputs.detach().float().cpu()
    if images.dim() == 5:
        images = images[:, :, images.shape[2] // 2]
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    longer = max(images.shape[-2:])
    if longer > THUMBNAIL_PIXELS:
        size = [max(1, side * THUMBNAIL_PIXELS // longer) for side in images.shape[-2:]]
        images = F.interpolate(images, size, mode="area")
    low, high = (extreme(images.flatten(1), dim=1)[:, None, None, None] for extreme in (torch.amin, torch.amax))
    return ((images - low) / (high - low).clamp(min=1e-12)).nan_to_num().movedim(1, -1)


class PatchMaps(NamedTuple):
    """Tokens (B, h, w, D) and attention (B, h, w) of the patches of some images, if the backbone provides them."""

    tokens: Tensor | None = None
    attention: Tensor | None = None


def principal_components(features: Tensor, count: int) -> Tensor:
    """Features (N, D) -> coordinates (N, count) along the axes of largest variance, zeros where there are fewer."""
    centered = (features - features.mean(dim=0)).double()
    u, sigma, axes = torch.linalg.svd(centered, full_matrices=False)
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    found = (u * sigma * largest.sign())[:, :count].float()  # the sign of an axis is arbitrary
    return F.pad(found, (0, count - found.shape[1]))


def patch_tokens(backbone: Any, images: Tensor) -> Tensor | None:
    """Images (B, C, H, W) -> the last layer's patch tokens (B, h, w, D); None if the backbone lacks the method.

    `get_intermediate_layers(images, n=1)`, as in the authors' models and timm's, returns [(B, N, D)]; class and
    register tokens may come first.
    """
    if not hasattr(backbone, "get_intermediate_layers") or images.dim() != 4:
        return None
    tokens: Tensor = backbone.get_intermediate_layers(images, n=1)[0]
    if tokens.dim() != 3:
        raise ValueError(f"get_intermediate_layers must return tokens (B, N, D), got {tuple(tokens.shape)}")
    height, width = _grid(backbone, tokens.shape[1], images)
    patches = tokens[:, tokens.shape[1] - height * width :].float().cpu()
    return patches.reshape(len(images), height, width, -1)


def attention_maps(backbone: Any, images: Tensor) -> Tensor | None:
    """Images -> attention of the class token to each patch (B, h, w), mean over heads; None without the method.

    `get_last_selfattention(images)`, as in the authors' models, returns (B, heads, N, N).
    """
    if not hasattr(backbone, "get_last_selfattention") or images.dim() != 4:
        return None
    attention: Tensor = backbone.get_last_selfattention(images)
    if attention.dim() != 4:
        raise ValueError(f"get_last_selfattention must return (B, heads, N, N), got {tuple(attention.shape)}")
    height, width = _grid(backbone, attention.shape[-1], images)
    return attention[:, :, 0, -height * width :].mean(dim=1).float().cpu().reshape(len(images), height, width)


def as_colours(tokens: Tensor) -> Tensor:
    """Patch tokens (B, h, w, D) -> (B, h, w, 3) in [0, 1]: their first three principal components over all images."""
    components = principal_components(tokens.flatten(end_dim=2), 3)
    low, high = (components.quantile(q, dim=0) for q in (0.01, 0.99))
    return ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).reshape(*tokens.shape[:3], 3)


def _grid(backbone: Any, tokens: int, images: Tensor) -> tuple[int, int]:
    """Number of patches along both sides, from the backbone's `patch_size`, or else the largest grid of its tokens."""
    height, width = images.shape[-2:]
    sized = backbone if hasattr(backbone, "patch_size") else getattr(backbone, "patch_embed", None)
    patch = getattr(sized, "patch_size", None)
    if patch is not None:
        rows, columns = patch if isinstance(patch, (tuple, list)) else (patch, patch)
        return height // rows, width // columns
    rows = int((tokens * height / width) ** 0.5)
    return rows, min(tokens // rows, round(rows * width / height))
