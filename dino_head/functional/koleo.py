"""The KoLeo loss, which spreads features evenly over the unit sphere.

Sizes: B samples, C candidates, k nearest neighbours, D features.
"""

import torch
from torch import Tensor

from dino_head._arguments import check_integer

EPSILON = 1e-8
# Unit vectors that are nearer than this differ by little more than float32's rounding.
DUPLICATE = 1e-6


def koleo_loss(x: Tensor, *, topk: int = 1, candidates: Tensor | None = None, offset: int = 0) -> Tensor:
    """Mean negative log distance of each sample to its nearest neighbours (Sablayrolles et al. 2018, arXiv:1806.03198).

    With unit vectors u_i = x_i / max(|x_i|, 1e-8) of the samples, c_j of the candidates, and N(i) the `topk` candidates
    with the largest u_i . c_j, other than sample i itself:

        loss = -mean over i and j in N(i) of  log(|u_i - c_j + 1e-8| + 1e-8)

    DINOv2 (arXiv:2304.07193) adds 0.1 times the sum over the global views, each with the neighbours in its own process.
    DINOv3 searches the features of all processes:

        candidates = self.all_gather(x, sync_grads=True).flatten(end_dim=-2)  # in a LightningModule
        loss = koleo_loss(x, candidates=candidates, offset=self.global_rank * len(x))

    Its mean over the processes is the loss of the joined batch. The gradients flow through samples and neighbours, and
    with `sync_grads=True` back to the process of the neighbour. Every process must have the same number of samples.

    The loss is computed in float32 or higher, under autocast as well. Duplicates (nearer than 1e-6) and zero vectors
    have no direction in which to move apart, so they get no gradient from each other. If features are NaN, or if the
    candidates from `offset` on are not x, the loss is NaN.

    Args:
        x: Features (B, D) of one view, before the head.
        topk: Number k of nearest neighbours, from 1 to C - 1.
        candidates: Features (C, D) of all processes, of which rows `offset` to `offset + B` are x. By default, x.
        offset: Number of samples of the processes before this one.

    Returns:
        The loss in nats, a scalar: float64 for float64 features, else float32.

    Raises:
        ValueError: Features that are not floating-point matrices of the same width, fewer than 2 candidates, a `topk`
            that is not below their number, or a number of candidates or an `offset` that is not a multiple of B.

    >>> koleo_loss(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # -ln sqrt(2)
    tensor(-0.3466)
    """
    everything = x if candidates is None else candidates
    _check_features(x, everything, offset)
    check_integer("topk", topk, 1)
    if topk >= len(everything):
        raise ValueError(
            f"koleo_loss has {len(everything) - 1} other candidates for each sample, got topk={topk}: use a smaller "
            "topk, a larger batch, or the candidates of all processes"
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, everything.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        units = _unit_rows(x.to(dtype))
        others = units if candidates is None else _unit_rows(candidates.to(dtype))
        with torch.no_grad():
            similarity = units @ others.T  # (B, C)
            similarity.diagonal(offset).fill_(-torch.inf)  # the samples themselves; -1 would tie with antipodes
            neighbours = similarity.topk(topk, dim=1).indices  # (B, k)
        difference = units.unsqueeze(1) - others[neighbours]  # (B, k, D)
        distance = torch.linalg.vector_norm(difference + EPSILON, dim=-1)
        # The gradient of a duplicate would be up to 1e8 times rounding errors, more than float16 holds.
        distance = torch.where(distance < DUPLICATE, distance.detach(), distance)
        loss: Tensor = -(distance + EPSILON).log().mean()
        if candidates is not None:  # by value, without waiting for the device
            own = candidates.detach()[offset : offset + len(x)] == x.detach()
            loss = torch.where(own.all(), loss, torch.nan)
    return loss


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows of unit length; zeros stay zeros and get no gradient, which would be up to 1e8."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    units: Tensor = rows / length.clamp_min(EPSILON).masked_fill(length == 0, torch.inf)
    return units


def _check_features(x: Tensor, candidates: Tensor, offset: int) -> None:
    for name, features in (("x", x), ("candidates", candidates)):
        shape = tuple(features.shape)
        if len(shape) != 2 or not features.is_floating_point():
            raise ValueError(
                f"koleo_loss expects floating-point {name} of shape (samples, features), got {shape} in "
                f"{features.dtype}: call it for each view by itself, with the class tokens or pooled features"
            )
    samples, total = len(x), len(candidates)
    if samples < 1 or total < 2:
        raise ValueError(
            f"koleo_loss needs a sample and 2 candidates, got {samples} and {total}: use a larger batch, or the "
            "candidates of all processes"
        )
    if x.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"x and candidates must have the same number of features, got {x.shape[1]} and {candidates.shape[1]}: "
            "gather the features that are passed as x"
        )
    check_integer("offset", offset, 0)
    if total % samples or offset % samples or offset + samples > total:
        raise ValueError(
            f"candidates must be the features of all processes, with as many samples of each as x, and offset the "
            f"number of samples before x: got {samples} samples, {total} candidates and offset={offset}. Give all "
            "processes batches of one size, and set offset=rank * len(x)"
        )
