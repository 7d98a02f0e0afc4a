"""Nearest neighbours by cosine similarity, in bounded memory, and their weighted vote.

Sizes: n samples, N candidates, D features, k neighbours.
"""

import math

import torch
from torch import Tensor


def nearest(
    features: Tensor,
    candidates: Tensor,
    k: int,
    *,
    excluded: tuple[Tensor, Tensor] | None = None,
    chunk_bytes: int = 2**26,
) -> tuple[Tensor, Tensor]:
    """Find the k most similar candidates of each feature.

    Args:
        features: Unit vectors (n, D).
        candidates: Unit vectors (N, D), N >= k.
        k: Number of neighbours, at most N.
        excluded: Groups of the samples (n,) and the candidates (N,); candidates of a sample's own group are skipped.
        chunk_bytes: Memory in bytes for the similarities; at least one sample is compared at a time.

    Returns:
        Cosine similarities (n, k) in float32, descending, and indices (n, k); -inf if a sample has fewer than k.
    """
    with torch.autocast(features.device.type, enabled=False):
        found = []
        size = max(1, chunk_bytes // (4 * len(candidates)))
        for rows in torch.arange(len(features), device=features.device).split(size):
            similarity = features[rows] @ candidates.T
            if excluded is not None:
                similarity.masked_fill_(excluded[0][rows, None] == excluded[1], -math.inf)
            found.append(similarity.topk(k))
    values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values, indices


def vote(similarity: Tensor, classes: Tensor, number: int, temperature: float) -> Tensor:
    """Similarities (n, k) and classes (n, k), below `number` -> classes (n,) of the largest sums of exp(s / T)."""
    weights = ((similarity - similarity[:, :1]) / temperature).exp()  # a common factor of a sample's weights cancels
    voted: Tensor = weights.new_zeros(len(weights), number).scatter_add_(1, classes, weights).argmax(dim=1)
    return voted


def count_broken(features: Tensor) -> Tensor:
    """Number of features (..., D) that contain NaN or inf, on the device."""
    return (~features.isfinite()).any(dim=-1).sum()


def check_finite(name: str, features: Tensor) -> None:
    """Raise ValueError unless all features (..., D) are finite; reads a value from the device."""
    require_none_broken(name, int(count_broken(features)), features.shape[:-1].numel())


def require_none_broken(name: str, broken: int, total: int) -> None:
    """Raise ValueError if any of the features contains NaN or inf."""
    if broken:
        raise ValueError(
            f"{broken} of {total} {name} contain NaN or inf: check the images behind them, the network's weights and "
            "the precision"
        )


def check_labelled(name: str, features: Tensor, labels: Tensor, groups: Tensor | None) -> None:
    """Raise ValueError unless these are features (N, D) with labels (N,), and groups (N,) if any."""
    if features.dim() != 2 or not features.is_floating_point() or not len(features):
        raise ValueError(
            f"{name} must have floating-point features (N, D) of at least one sample, got {tuple(features.shape)} "
            f"in {features.dtype}: pool or flatten them"
        )
    for kind, values in (("labels", labels), ("groups", groups)):
        if values is not None and (values.shape != features.shape[:1] or values.is_floating_point()):
            raise ValueError(
                f"{name} must have integer {kind} (N,), one for each of the {len(features)} features, got "
                f"{tuple(values.shape)} in {values.dtype}"
            )
