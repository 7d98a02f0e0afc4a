"""k-nearest-neighbour accuracy, as a torchmetrics metric.

Sizes: N samples, D features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_head._arguments import check_integer, check_number
from dino_head.metrics._neighbours import (
    check_finite,
    check_labelled,
    count_broken,
    nearest,
    require_none_broken,
    vote,
)
from dino_head.metrics._plotted import PlottedMetric


class KNNAccuracy(PlottedMetric):
    """Accuracy of a weighted vote of the k nearest labelled features, as in the authors' eval_knn.py.

        s_i = cosine similarity to voter i
        class = argmax_c  sum over the k nearest voters i of class c  exp(s_i / temperature)

    (Wu et al. 2018, arXiv:1805.01978, section 3.4.) The voters are fixed at construction and stay at `reset`; `update`
    classifies samples. With groups (patients, slides, scenes), voters of a sample's own group do not vote for it,
    because neighbours from the same patient make the accuracy look better than it is.

    With several processes, each needs all voters and classifies its own part of the samples. `update` reads nothing
    from the device; `compute` raises the errors that depend on values.

    Args:
        features: Features of the voters, (N, D).
        labels: Labels of the voters, integers (N,) of any values.
        k: Number of neighbours that vote on a sample, at most N.
        temperature: Temperature of the votes' weights, > 0.
        groups: Groups of the voters, integers (N,); None for no groups.
        kwargs: Options of torchmetrics' `Metric`.

    Raises:
        ValueError: Shapes that do not match, fewer voters than k, only one class, features that are not finite, or an
            argument out of range.

    >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> knn = KNNAccuracy(features, torch.tensor([3, 3, 7, 7]), k=2)
    >>> knn.update(torch.tensor([[2.0, 0.5], [0.5, 3.0]]), torch.tensor([3, 3]))
    >>> knn.compute()
    tensor(0.5000)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    features: Tensor
    classes: Tensor
    of_voters: Tensor  # indices of the voters' classes
    groups: Tensor | None
    right: Tensor
    samples: Tensor
    broken: Tensor
    alone: Tensor

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        k: int = 20,
        temperature: float = 0.07,
        *,
        groups: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_integer("k", k, 1)
        check_number("temperature", temperature, 0, float("inf"), exclude_minimum=True)
        check_labelled("voters", features, labels, groups)
        check_finite("features of the voters", features)
        if len(features) < k:
            raise ValueError(f"k={k} voters are needed, got {len(features)}: add voters, or lower k")
        classes, of_voters = labels.unique(return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"all {len(labels)} voters have the label {classes.item()}, so that every vote is right or wrong "
                "whatever the features: add voters of another class"
            )
        self.k, self.temperature = k, temperature
        self.register_buffer("features", F.normalize(features.float(), dim=1), persistent=False)
        self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("of_voters", of_voters, persistent=False)
        self.register_buffer("groups", groups, persistent=False)
        for name in ("right", "samples", "broken", "alone"):  # numbers of samples
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, groups: Tensor | None = None) -> None:
        """Classify features (N, D) with labels (N,), and with groups (N,) if the voters have groups.

        Raises:
            ValueError: Shapes that do not match, or groups of only one side.
        """
        check_labelled("samples", features, labels, groups)
        if features.shape[1] != self.features.shape[1]:
            raise ValueError(
                f"samples must have features of width {self.features.shape[1]}, as the voters, got "
                f"{features.shape[1]}: compute both with one network"
            )
        if (groups is None) != (self.groups is None):
            given, missing = ("voters", "samples") if groups is None else ("samples", "voters")
            raise ValueError(
                f"the {given} have groups and the {missing} have none: pass groups for both or for neither"
            )
        excluded = None if groups is None or self.groups is None else (groups, self.groups)
        unit = F.normalize(features.float(), dim=1)
        similarity, indices = nearest(unit, self.features, self.k, excluded=excluded)
        voted = vote(similarity, self.of_voters[indices], len(self.classes), self.temperature)
        self.right += (self.classes[voted] == labels).sum()
        self.samples += len(features)
        self.broken += count_broken(features)
        self.alone += similarity[:, 0].isneginf().sum()

    def compute(self) -> Tensor:
        """Share of correct samples, in [0, 1]; NaN without samples.

        Raises:
            ValueError: Features that are not finite, or a sample without a voter outside its group.
        """
        broken, alone, samples = torch.stack([self.broken, self.alone, self.samples]).tolist()
        require_none_broken("features of the samples", broken, samples)
        if alone:
            raise ValueError(
                f"{alone} of {samples} samples have no neighbour outside of their own group: add voters of other groups"
            )
        return self.right.float() / self.samples
