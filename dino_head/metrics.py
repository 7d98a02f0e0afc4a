"""What one looks at while DINO trains, as torchmetrics: distributions over prototypes, rank of features, kNN.

Not imported by `dino_head`, as torchmetrics takes about as long to load as torch.

Sizes: N samples, B samples of a batch, T teacher views, S student views, K prototypes, D features, C classes.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from dino_head._arguments import check_integer, check_number
from dino_head._neighbours import check_finite, check_labelled, nearest, vote
from dino_head._statistics import effective_rank, log_softmax, logits_of, statistics_of, sums_of
from dino_head.functional import BLOCK_BYTES, Logits, check_sides, evenly, flat_center, output_dim, stacked
from dino_head.prototypes import FactoredLogits


class _Plotted(Metric):
    is_differentiable = False
    full_state_update = False

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the result of `compute`, or `val`, such a result or a list of them -> figure and axes (matplotlib's)."""
        return self._plot(val, ax)


class DINOStatistics(_Plotted):
    """The teacher's and the student's distributions over the prototypes, and what the loss consists of.

        p_t = softmax((teacher_t - center) / teacher_temp),  q_s = softmax(student_s / student_temp)
        loss = mean over t != s of H(p_t, q_s) = teacher_entropy + kl
        teacher_entropy = mean over t of H(p_t),  kl = mean over t != s of KL(p_t || q_s)

    The entropy is what the student cannot take away; it is at most ln K, a uniform teacher's. `compute` gives a dict of
    scalars:

    - `loss`, `teacher_entropy`, `student_entropy` in nats, each also divided by ln K (`..._normalized`), and
      `kl` in nats;
    - `prototypes_used`: the share of the prototypes that win (argmax) for at least one of the teacher's rows. Of n rows
      it cannot be more than n / K;
    - `prototype_perplexity`: their effective number, exp of the entropy of the mean of p_t, between 1 and K;
    - `rows`, how many of the teacher's rows it is about, and `output_dim`, K.

    Sums over samples and processes are its state, so that it does not depend on how they are divided.

    Args:
        output_dim: K.
        max_rows: of FactoredLogits, at most so many rows (views times samples, of both sides; at least one sample's)
            are multiplied in an update, of samples spread evenly over the batch. Logits are taken whole.
        kwargs: of torchmetrics' `Metric`.

    Raises:
        ValueError: K < 2, or max_rows < 1.

    >>> statistics = DINOStatistics(output_dim=16)
    >>> statistics.update(torch.zeros(2, 3, 16), torch.zeros(4, 3, 16))  # uniform on both sides
    >>> values = statistics.compute()
    >>> values["teacher_entropy"], values["teacher_entropy_normalized"], values["kl"]
    (tensor(2.7726), tensor(1.0000), tensor(0.))
    """

    higher_is_better = None
    teacher_entropy: Tensor
    student_entropy: Tensor
    loss: Tensor
    samples: Tensor
    rows: Tensor
    wins: Tensor
    assignment: Tensor

    def __init__(self, output_dim: int, *, max_rows: int = 256, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("output_dim", output_dim, 2, " (a distribution over one prototype says nothing)")
        check_integer("max_rows", max_rows, 1)
        self.output_dim, self.max_rows = output_dim, max_rows
        # Sums over samples: entropies and loss of a sample are means over its views. In float64, as the KL is a
        # small difference of large sums.
        for name in ("teacher_entropy", "student_entropy", "loss", "samples", "rows"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("wins", "assignment"):
            self.add_state(name, torch.zeros(output_dim, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(
        self,
        teacher_out: Logits,
        student_out: Logits,
        *,
        center: Tensor | float = 0.0,
        teacher_temp: float = 0.07,
        student_temp: float = 0.1,
    ) -> None:
        """Add a batch: the arguments of `dino_loss`, whose value `loss` is.

        Raises:
            ValueError: what `dino_loss` refuses, or another K.
        """
        check_number("teacher_temp", teacher_temp, 0, float("inf"), exclude_minimum=True)
        check_number("student_temp", student_temp, 0, float("inf"), exclude_minimum=True)
        teacher, student = stacked(teacher_out), stacked(student_out)
        check_sides(teacher, student)
        if output_dim(teacher) != self.output_dim:
            raise ValueError(
                f"the statistics were made for {self.output_dim} prototypes (output_dim), got {output_dim(teacher)}: "
                "give head and statistics the same output_dim"
            )
        center = flat_center(center, teacher)
        by_view = [side if isinstance(side, Tensor) else side.z for side in (teacher, student)]
        views = sum(map(len, by_view))
        samples = torch.arange(by_view[0].shape[1], device=self.wins.device)
        if isinstance(teacher, FactoredLogits):
            count = min(len(samples), max(1, self.max_rows // views))
            samples = samples[evenly(len(samples), count)]
        with torch.autocast(self.wins.device.type, enabled=False):
            # Each step below makes some tensors of a block's size.
            for part in samples.split(max(1, BLOCK_BYTES // 4 // (4 * self.output_dim * views))):
                log_p = log_softmax((logits_of(teacher, part) - center) / teacher_temp)
                log_q = log_softmax(logits_of(student, part) / student_temp)
                for name, value in sums_of(log_p, log_q).items():
                    setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, Tensor]:
        """Means over all samples so far; NaN without any."""
        return statistics_of(self.sums())

    def sums(self) -> dict[str, Tensor]:
        """The state, for `statistics_of`; those of several batches may be added."""
        return {name: getattr(self, name) for name in self.metric_state}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw what is in nats, and ln K dashed; see the other metrics' `plot`."""
        results = self.compute() if val is None else val
        in_nats = [
            {name: result[name] for name in ("loss", "teacher_entropy", "student_entropy", "kl")}
            for result in (results if isinstance(results, (list, tuple)) else [results])
        ]
        figure, axes = super().plot(in_nats if len(in_nats) > 1 else in_nats[0], ax)
        axes.axhline(math.log(self.output_dim), linestyle="--", color="tab:gray")
        return figure, axes


class RankMe(_Plotted):
    """The effective rank of features, RankMe (Garrido et al. 2023, arXiv:2210.02885, equations 1 and 2).

        RankMe = exp(-sum_k p_k ln p_k),  p_k = sigma_k / sum_j sigma_j + 1e-7

    with the min(N, D) singular values sigma of the features (N, D), which are not centered. Between 1 and min(N, D):
    compare values of the same N. A drop while training tells of dimensional collapse, without labels.

    The state is the features' product with themselves (D, D), in float64, as the square halves the digits, and N.

    Args:
        num_features: D.
        kwargs: of torchmetrics' `Metric`.

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

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_integer("num_features", num_features, 1)
        self.add_state("products", torch.zeros(num_features, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add features (..., D), each of the last dimension's vectors a sample.

        Raises:
            ValueError: another D, or features that are not finite.
        """
        if features.dim() < 2 or features.shape[-1] != len(self.products):
            raise ValueError(
                f"RankMe was made for features (..., {len(self.products)}) (num_features), got {tuple(features.shape)}"
            )
        check_finite("features", features)
        flat = features.flatten(end_dim=-2).to(self.products.dtype)
        self.products += flat.T @ flat
        self.samples += len(flat)

    def compute(self) -> Tensor:
        """The effective rank of all features so far; 1 if all are zero, NaN if there are none."""
        return effective_rank(self.products, self.samples)


class KNNAccuracy(_Plotted):
    """Accuracy of a weighted vote of the k nearest labelled features, as the authors evaluate (their eval_knn.py).

        s_i = cosine similarity to voter i
        class = argmax_c  sum over those i of the k nearest that are of class c  exp(s_i / temperature)

    (Wu et al. 2018, arXiv:1805.01978, section 3.4.) `update` classifies samples; the voters are given at the start and
    stay, also at `reset`. With groups (patients, slides, scenes) the voters of a sample's own group do not vote for it:
    neighbours from the same patient make accuracy look better than it is.

    The share of right samples is its state; in several processes each holds all voters and its part of the samples.

    Args:
        features: of the voters, (N, D).
        labels: of the voters, (N,), integers of any values.
        k: how many vote; at most N.
        temperature: of the weights, > 0.
        groups: of the voters, (N,), integers; None: no groups.
        chunk_bytes: memory for similarities of some samples to all voters (at least one sample's).
        kwargs: of torchmetrics' `Metric`.

    Raises:
        ValueError: shapes that do not fit, fewer voters than k, one class alone, features that are not finite, or an
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
    labels: Tensor
    groups: Tensor | None
    right: Tensor
    samples: Tensor

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        k: int = 20,
        temperature: float = 0.07,
        *,
        groups: Tensor | None = None,
        chunk_bytes: int = 2**26,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_integer("k", k, 1)
        check_number("temperature", temperature, 0, float("inf"), exclude_minimum=True)
        check_integer("chunk_bytes", chunk_bytes, 1)
        check_labelled("voters", features, labels, groups)
        if len(features) < k:
            raise ValueError(f"k={k} are to vote, but there are only {len(features)} voters: give more, or lower k")
        classes = labels.unique()
        if len(classes) < 2:
            raise ValueError(
                f"all {len(labels)} voters have the label {classes.item()}, so that every vote is right or wrong "
                "whatever the features: give voters of at least two classes"
            )
        self.k, self.temperature, self.chunk_bytes = k, temperature, chunk_bytes
        self.register_buffer("features", F.normalize(features.float(), dim=1), persistent=False)
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("groups", groups, persistent=False)
        self.add_state("right", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0.0), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, groups: Tensor | None = None) -> None:
        """Classify features (N, D) with labels (N,); groups (N,) if the voters have some.

        Raises:
            ValueError: shapes that do not fit, features that are not finite, groups of one side alone, or a sample
                without a voter outside of its group.
        """
        check_labelled("samples", features, labels, groups)
        if features.shape[1] != self.features.shape[1]:
            raise ValueError(
                f"the voters have features of width {self.features.shape[1]}, got samples of {features.shape[1]}: take "
                "both from one network"
            )
        if (groups is None) != (self.groups is None):
            given, missing = ("voters", "samples") if groups is None else ("samples", "voters")
            raise ValueError(f"the {given} have groups and the {missing} have none: give groups to both or to neither")
        excluded = None if groups is None or self.groups is None else (groups, self.groups)
        unit = F.normalize(features.float(), dim=1)
        found = nearest(unit, self.features, self.k, excluded=excluded, chunk_bytes=self.chunk_bytes)
        self.right += (vote(*found, self.labels, self.temperature) == labels).sum()
        self.samples += len(features)

    def compute(self) -> Tensor:
        """The share of right samples, in [0, 1]; NaN without any."""
        return self.right / self.samples
