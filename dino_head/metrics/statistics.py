"""Distributions over the prototypes, as a torchmetrics metric.

Sizes: b samples of B, T teacher views, S student views, K prototypes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dino_head._arguments import check_integer, check_number
from dino_head.functional._outputs import Logits, as_outputs, check_sides, flat_center
from dino_head.functional._workspace import BLOCK_BYTES
from dino_head.metrics._plotted import PlottedMetric


class DINOStatistics(PlottedMetric):
    """Distributions of teacher and student over the prototypes, and the two parts of the loss.

        p_t = softmax((teacher_t - center) / teacher_temp),  q_s = softmax(student_s / student_temp)
        loss = mean over t != s of H(p_t, q_s) = teacher_entropy + kl
        teacher_entropy = mean over t of H(p_t),  kl = mean over t != s of KL(p_t || q_s)

    With one view on each side, such as (1, M, K) for the M masked patches of IBOTPatchLoss, the only pair is t = s, and
    it counts.

    The student cannot lower the teacher's entropy, which is at most ln K, the entropy of a uniform teacher. `compute`
    returns a dict of scalars:

    - `loss`, `teacher_entropy` and `student_entropy` in nats, each also divided by ln K (`..._normalized`), and `kl` in
      nats;
    - `prototypes_used`: share of the prototypes that win (argmax) for at least one row of the teacher, at most n / K
      for n rows;
    - `prototype_perplexity`: exp of the entropy of the mean of p_t, between 1 and K: the effective number of
      prototypes;
    - `rows`, the number of rows of the teacher, and `output_dim`, K.

    The state consists of sums over samples and processes, so the values do not depend on how samples are batched.

    Args:
        output_dim: Number K of prototypes, >= 2.
        max_rows: Maximum number of rows (views times samples, both sides together) that an update multiplies if the
            outputs are FactoredLogits: it uses at least one sample, and spreads samples evenly over the batch. Logits
            are used completely.
        kwargs: Options of torchmetrics' `Metric`.

    Raises:
        ValueError: `output_dim` < 2, or `max_rows` < 1.

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
        check_integer("output_dim", output_dim, 2, " (a distribution over one prototype is constant)")
        check_integer("max_rows", max_rows, 1)
        self.output_dim, self.max_rows = output_dim, max_rows
        # Sums over samples: entropies and loss of a sample are means over its views. In float64, because the KL is a
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
        """Add a batch, with the arguments of `dino_loss`.

        Raises:
            ValueError: Arguments that `dino_loss` does not accept, or another K.
        """
        check_number("teacher_temp", teacher_temp, 0, float("inf"), exclude_minimum=True)
        check_number("student_temp", student_temp, 0, float("inf"), exclude_minimum=True)
        teacher, student = as_outputs(teacher_out), as_outputs(student_out)
        check_sides(teacher, student)
        if teacher.output_dim != self.output_dim:
            raise ValueError(
                f"the statistics were made for {self.output_dim} prototypes (output_dim), got {teacher.output_dim}: "
                "give head and statistics the same output_dim"
            )
        center = flat_center(center, self.output_dim)
        views = teacher.views + student.views
        count = teacher.samples
        if teacher.prototypes is not None:
            count = min(count, max(1, self.max_rows // views))
        # Like `spaced_indices`, but on the device.
        samples = torch.arange(count, device=self.wins.device) * (teacher.samples - 1) // max(1, count - 1)
        with torch.autocast(self.wins.device.type, enabled=False):
            # Each step below allocates several tensors of a block's size.
            for part in samples.split(max(1, BLOCK_BYTES // 4 // (4 * self.output_dim * views))):
                log_p = log_softmax((teacher.logits_of(part) - center) / teacher_temp)
                log_q = log_softmax(student.logits_of(part) / student_temp)
                for name, value in sums_of(log_p, log_q).items():
                    setattr(self, name, getattr(self, name) + value)

    def compute(self) -> dict[str, Tensor]:
        """Means over all samples so far; NaN without samples."""
        return statistics_of(self.sums())

    def sums(self) -> dict[str, Tensor]:
        """The state, for `statistics_of`; the states of several batches may be added."""
        return {name: getattr(self, name) for name in self.metric_state}

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the values in nats, with ln K as a dashed line; see `plot` of the other metrics."""
        results = self.compute() if val is None else val
        in_nats = [
            {name: result[name] for name in ("loss", "teacher_entropy", "student_entropy", "kl")}
            for result in (results if isinstance(results, (list, tuple)) else [results])
        ]
        figure, axes = super().plot(in_nats if len(in_nats) > 1 else in_nats[0], ax)
        axes.axhline(math.log(self.output_dim), linestyle="--", color="tab:gray")
        return figure, axes


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension; a probability of 0 stays finite, so that 0 ln 0 is 0."""
    return logits.log_softmax(dim=-1).clamp_(min=-1e30)


def sums_of(log_p: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """Log-probabilities (T, b, K) and (S, b, K) -> the states of DINOStatistics, for these samples.

    Entropies and loss of a sample are means over its views.
    """
    views, samples, count = log_p.shape
    p = log_p.exp()
    total = p.sum(dim=0)  # (b, K)
    loss, pairs = -(total * log_q.sum(dim=0)).sum(), views * len(log_q)
    if pairs > 1:  # without t = s
        loss, pairs = loss + (p * log_q[:views]).sum(), pairs - views
    return {
        "loss": loss / pairs,
        "teacher_entropy": -(p * log_p).sum() / views,
        "student_entropy": -(log_q.exp() * log_q).sum() / len(log_q),
        "samples": p.new_full((), samples),
        "rows": p.new_full((), views * samples),
        "assignment": total.sum(dim=0),
        # Without bincount, which reads the largest index from the device.
        "wins": p.new_zeros(count).scatter_add_(0, log_p.argmax(dim=-1).flatten(), p.new_ones(views * samples)),
    }


def statistics_of(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a DINOStatistics, or the sum of several states -> the values that it computes."""
    count = len(sums["wins"])
    values = {name: sums[name] / sums["samples"] for name in ("loss", "teacher_entropy", "student_entropy")}
    values |= {f"{name}_normalized": value / math.log(count) for name, value in values.items()}
    values["kl"] = values["loss"] - values["teacher_entropy"]
    values["prototypes_used"] = (sums["wins"] > 0).double().mean()
    values["prototype_perplexity"] = torch.special.entr(sums["assignment"] / sums["rows"]).sum().exp()
    values |= {"rows": sums["rows"], "output_dim": torch.tensor(count)}
    return {name: value.float() for name, value in values.items()}
