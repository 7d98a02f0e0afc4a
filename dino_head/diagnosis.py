"""Diagnosis of a run from its statistics, in words: the kind of collapse and the option to change."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import SupportsFloat

# Diagnoses of a failed run; the others may be harmless.
COLLAPSES = ("not finite", "teacher does not follow", "one-hot collapse", "uniform teacher", "dimensional collapse")

UNIFORM = 0.98  # of ln K
FEW_PROTOTYPES = 2.0  # effective number
LOW_RANK = 2.0
DEAD = 0.05  # of the number of prototypes that as many random rows would reach
FLAT = 0.01  # relative change of the loss
LARGE_LOSS, LARGE_K = 0.8, 4096  # of ln K; prototypes


def diagnose(statistics: Mapping[str, SupportsFloat]) -> str | None:
    """Name the problem of a run, with its numbers and the option to change; None if there is no problem.

    Average the statistics over a few hundred steps: untrained networks look like collapsed ones, and a healthy run
    needs some time to leave that state. The cases, in the order in which they are checked:

    - not finite: any value is NaN or inf;
    - teacher does not follow: its weights stayed bitwise unchanged while the student's changed;
    - one-hot collapse: a prototype perplexity below 2 (below 1.5 if K = 2): all images get the same prototype;
    - uniform teacher: the entropies of teacher and student are above 0.98 ln K;
    - dimensional collapse: RankMe below 2;
    - dead prototypes: the number of prototypes that win for at least one row is below 5% of the number that as many
      random rows would reach. This is harmless for images of few kinds;
    - no collapse: a loss above 0.8 ln K that changes by less than 1%, with K >= 4096, and none of the above. Most of
      that loss is the teacher's own entropy, which grows with K.

    Args:
        statistics: Values of `DINOStatistics.compute` and, optionally, `rankme`, `loss_change` (relative change of the
            loss over the measured period) and `teacher_follows` (0 if the teacher's weights stayed unchanged in that
            period while the student's changed, else 1). Cases whose values are missing are not checked.

    Returns:
        "<case>: <observation>. <Remedy>."

    >>> diagnose({"teacher_entropy": 6.23, "teacher_entropy_normalized": 0.999, "student_entropy_normalized": 1.0})[:15]
    'uniform teacher'
    """
    # A missing value is NaN, and every comparison with NaN is false.
    seen = defaultdict(lambda: math.nan, {name: float(value) for name, value in statistics.items()})
    broken = [name for name, value in seen.items() if not math.isfinite(value)]
    if broken:
        return (
            f"not finite: {', '.join(broken)}. Look at images, augmentation and weights for NaN or inf; lower the "
            "learning rate, clip gradients, use bf16 instead of fp16"
        )
    for case in (_teacher_stands, _one_hot, _uniform, _low_rank, _dead_prototypes, _large_k):
        found = case(seen)
        if found is not None:
            return found
    return None


def _teacher_stands(seen: Mapping[str, float]) -> str | None:
    if seen["teacher_follows"] == 0:
        return (
            "teacher does not follow: its weights are bitwise unchanged, while the student's have changed. Add "
            "TeacherUpdateCallback to the Trainer, with pairs that name this teacher, and a momentum below 1"
        )
    return None


def _one_hot(seen: Mapping[str, float]) -> str | None:
    if seen["prototype_perplexity"] < min(FEW_PROTOTYPES, 0.75 * seen["output_dim"]):
        return (
            f"one-hot collapse: all images get the same prototype (effective number {seen['prototype_perplexity']:.2f} "
            f"of {seen['output_dim']:.0f}, teacher entropy {seen['teacher_entropy']:.3f} nats, KL {seen['kl']:.3f}). "
            "Check that the center is updated (center_momentum below 1, the loss in train mode) or use "
            "centering='sinkhorn', raise the teacher temperature (teacher_temp), and resume from an earlier checkpoint"
        )
    return None


def _uniform(seen: Mapping[str, float]) -> str | None:
    if seen["teacher_entropy_normalized"] > UNIFORM and seen["student_entropy_normalized"] > UNIFORM:
        images = ""
        if seen["rankme"] < LOW_RANK:
            images = (
                f"The effective rank of the embeddings is {seen['rankme']:.2f}: look at a batch first, its images may "
                "all be the same after normalisation. "
            )
        return (
            f"uniform teacher: its entropy is {seen['teacher_entropy']:.4f} nats, "
            f"{seen['teacher_entropy_normalized']:.3f} ln K, and the student agrees, so that the loss stays at ln K "
            f"and nothing is learnt. {images}Lower the teacher temperature (teacher_temp; the authors start at 0.04), "
            "and check that teacher and student are not the same object. In the first epochs it may resolve itself "
            "once the learning rate has warmed up"
        )
    return None


def _low_rank(seen: Mapping[str, float]) -> str | None:
    if seen["rankme"] < LOW_RANK:
        return (
            f"dimensional collapse: the effective rank of the embeddings (RankMe) is {seen['rankme']:.2f}: they all "
            "point in much the same direction. Check that the images differ after normalisation, lower the learning "
            "rate, or use batch norm in the head"
        )
    return None


def _dead_prototypes(seen: Mapping[str, float]) -> str | None:
    used, count, rows = seen["prototypes_used"] * seen["output_dim"], seen["output_dim"], seen["rows"]
    reachable = count * -math.expm1(rows * math.log1p(-1 / count)) if count > 1 else math.nan  # by `rows` random draws
    if used < DEAD * reachable:
        return (
            f"dead prototypes: {used:.0f} of {count:.0f} win for any of {rows:.0f} rows, where random ones would reach "
            f"{reachable:.0f}. If the images are of more kinds than that, freeze the last layer for longer or use "
            "centering='sinkhorn'; otherwise it is harmless, and a smaller output_dim saves time"
        )
    return None


def _large_k(seen: Mapping[str, float]) -> str | None:
    is_flat = seen["loss_normalized"] > LARGE_LOSS and abs(seen["loss_change"]) < FLAT
    if is_flat and seen["output_dim"] >= LARGE_K:
        return (
            f"no collapse: the loss of {seen['loss']:.2f} nats is flat at {seen['loss_normalized']:.2f} ln K because K "
            f"= {seen['output_dim']:.0f} is large: {seen['teacher_entropy']:.2f} of it are the teacher's own entropy, "
            f"which no student can lower, and {seen['kl']:.2f} are KL, in which it learns. Watch KL and kNN; a lower "
            "teacher temperature or fewer prototypes lower the entropy"
        )
    return None
