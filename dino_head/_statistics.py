"""What the metrics compute, as pure functions: sums over samples, and what follows from them.

Sizes: b samples, T teacher views, S student views, K prototypes, D features.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dino_head.prototypes import FactoredLogits


def logits_of(out: Tensor | FactoredLogits, samples: Tensor) -> Tensor:
    """Logits (V, b, K) of some samples, in float32 at least."""
    if isinstance(out, Tensor):
        return out[:, samples].to(torch.promote_types(out.dtype, torch.float32))
    return F.linear(out.z[:, samples].float(), out.prototypes.float())


def log_softmax(logits: Tensor) -> Tensor:
    """Over the last dimension; a probability of 0 stays finite, so that 0 ln 0 is 0."""
    return logits.log_softmax(dim=-1).clamp_(min=-1e30)


def sums_of(log_p: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """Log-probabilities (T, b, K) and (S, b, K) -> the states of DINOStatistics, for these samples.

    Entropies and loss of a sample are means over its views.
    """
    views, samples, count = log_p.shape
    p = log_p.exp()
    total = p.sum(dim=0)  # (b, K)
    own = (p * log_q[:views]).sum()  # t = s, which the loss leaves out
    return {
        "loss": (own - (total * log_q.sum(dim=0)).sum()) / (views * (len(log_q) - 1)),
        "teacher_entropy": -(p * log_p).sum() / views,
        "student_entropy": -(log_q.exp() * log_q).sum() / len(log_q),
        "samples": p.new_tensor(samples),
        "rows": p.new_tensor(views * samples),
        "assignment": total.sum(dim=0),
        "wins": torch.bincount(log_p.argmax(dim=-1).flatten(), minlength=count),
    }


def statistics_of(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `DINOStatistics.sums` gives, or the sum of several -> what `compute` gives."""
    count = len(sums["wins"])
    values = {name: sums[name] / sums["samples"] for name in ("loss", "teacher_entropy", "student_entropy")}
    values |= {f"{name}_normalized": value / math.log(count) for name, value in values.items()}
    values["kl"] = values["loss"] - values["teacher_entropy"]
    values["prototypes_used"] = (sums["wins"] > 0).double().mean()
    values["prototype_perplexity"] = torch.special.entr(sums["assignment"] / sums["rows"]).sum().exp()
    values |= {"rows": sums["rows"], "output_dim": torch.tensor(count)}
    return {name: value.float() for name, value in values.items()}


def effective_rank(products: Tensor, samples: Tensor) -> Tensor:
    """The states of a RankMe, or sums of several -> what it computes."""
    count = int(samples)
    if not count:
        return products.new_full((), math.nan, dtype=torch.float32)
    sigma = torch.linalg.eigvalsh(products).flip(0)[:count].clamp(min=0).sqrt()
    p = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny) + 1e-7
    rank: Tensor = torch.special.entr(p).sum().exp()
    return rank.float()
