"""Effective rank of features, as a torchmetrics metric.

Sizes: N samples, D features.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dino_head._arguments import check_integer
from dino_head.metrics._neighbours import count_broken, require_none_broken
from dino_head.metrics._plotted import PlottedMetric


class RankMe(PlottedMetric):
    """Effective rank of features, RankMe (Garrido et al. 2023, arXiv:2210.02885, equations 1 and 2).

        RankMe = exp(-sum_k p_k ln p_k),  p_k = sigma_k / sum_j sigma_j + 1e-7

    with the min(N, D) singular values sigma of the features (N, D), which are not centered. It lies between 1 and
    min(N, D), so compare values of the same N. A drop during training indicates dimensional collapse, without labels.

    The state is N and the Gram matrix of the features (D, D), in float64 because squaring halves the precision.
    `update` reads nothing from the device; `compute` raises the error for features that are not finite.

    Args:
        num_features: Width D of the features, >= 1.
        kwargs: Options of torchmetrics' `Metric`.

    Raises:
        ValueError: D < 1.

    >>> rank = RankMe(num_features=8)
    >>> rank.update(torch.eye(8)[:5])  # 5 orthogonal features of equal norm
    >>> rank.compute()
    tensor(5.0000)
    """

    higher_is_better = True
    plot_lower_bound = 1.0
    products: Tensor
    samples: Tensor
    broken: Tensor

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("num_features", num_features, 1)
        self.add_state("products", torch.zeros(num_features, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("broken", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add features (..., D); each vector along the last dimension is a sample.

        Raises:
            ValueError: Features of another width.
        """
        if features.dim() < 2 or features.shape[-1] != len(self.products):
            raise ValueError(
                f"RankMe was made for features (..., {len(self.products)}) (num_features), got {tuple(features.shape)}"
            )
        self.broken += count_broken(features)
        flat = features.flatten(end_dim=-2).to(self.products.dtype)
        self.products += flat.T @ flat
        self.samples += len(flat)

    def compute(self) -> Tensor:
        """The effective rank of all features so far; 1 if all are zero, NaN if there are none.

        Raises:
            ValueError: Features that are not finite.
        """
        require_none_broken("features", int(self.broken), int(self.samples))
        return effective_rank(self.products, self.samples)


def effective_rank(products: Tensor, samples: Tensor) -> Tensor:
    """The state of a RankMe, or the sum of several states -> the effective rank; NaN if a feature is not finite."""
    count = int(samples)
    if not count or not products.isfinite().all():
        return products.new_full((), math.nan, dtype=torch.float32)
    sigma = torch.linalg.eigvalsh(products).flip(0)[:count].clamp(min=0).sqrt()
    p = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny) + 1e-7
    rank: Tensor = torch.special.entr(p).sum().exp()
    return rank.float()
