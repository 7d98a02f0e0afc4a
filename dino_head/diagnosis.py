"""Diagnosis of a run from its statistics, in words: the kind of collapse and the option to change."""

import math
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
PATCHES = "patches: "  # begins the diagnoses of masked patches


class _Values(dict[str, float]):
    """Statistics by name. A missing one is NaN, and every comparison with NaN is false."""

    rows = "images"  # or "patches"

    def __missing__(self, name: str) -> float:
        return math.nan


def diagnose(statistics: Mapping[str, SupportsFloat], *, rows: str = "images") -> str | None:
    """Name the problem of a run, with its numbers and the option to change; None if there is no problem.

    Average the statistics over a few hundred steps: untrained networks look like collapsed ones, and a healthy run
    needs some time to leave that state. The cases, in the order in which they are checked:

    - not finite: any value is NaN or inf;
    - teacher does not follow: its weights stayed bitwise unchanged while the student's changed;
    - one-hot collapse: a prototype perplexity below 2 (below 1.5 if K = 2): all rows get the same prototype;
    - uniform teacher: the entropies of teacher and student are above 0.98 ln K;
    - dimensional collapse: RankMe below 2;
    - dead prototypes: the number of prototypes that win for at least one row is below 5% of the number that as many
      random rows would reach. This is harmless for images of few kinds;
    - no collapse: a loss above 0.8 ln K that changes by less than 1%, with K >= 4096, and none of the above. Most of
      that loss is the teacher's own entropy, which grows with K;
    - few samples for Sinkhorn: a batch has fewer rows than prototypes, as in the authors' runs. This is harmless if
      many prototypes are used.

    Args:
        statistics: Values of `DINOStatistics.compute` and, optionally, `rankme`, `loss_change` (relative change of the
            loss over the measured period), `teacher_follows` (0 if the teacher's weights stayed unchanged in that
            period while the student's changed, else 1) and `sinkhorn_rows` (number of the teacher's rows in a batch, on
            all processes, that Sinkhorn spreads over the prototypes). Cases whose values are missing are not checked.
        rows: Kind of the rows: "images", or "patches" for the masked patches of IBOTPatchLoss.

    Returns:
        "<case>: <observation>. <Remedy>"; for patches, "patches: <case>: ...".

    Raises:
        ValueError: Another kind of rows.

    >>> diagnose({"teacher_entropy": 6.23, "teacher_entropy_normalized": 0.999, "student_entropy_normalized": 1.0})[:15]
    'uniform teacher'
    """
    if rows not in ("images", "patches"):
        raise ValueError(f'rows must be "images" or "patches", got {rows!r}')
    found = _first_case(statistics, rows)
    return f"{PATCHES}{found}" if found and rows == "patches" else found


def case_of(diagnosis: str) -> str:
    """The case that a diagnosis names, with the kind of its rows."""
    return diagnosis[: diagnosis.index(":", len(PATCHES) * diagnosis.startswith(PATCHES))]


def is_collapse(diagnosis: str) -> bool:
    """Whether a diagnosis names a failed run; the others may be harmless."""
    return case_of(diagnosis).removeprefix(PATCHES) in COLLAPSES


def _first_case(statistics: Mapping[str, SupportsFloat], rows: str) -> str | None:
    seen = _Values({name: float(value) for name, value in statistics.items()})
    seen.rows = rows
    broken = [name for name, value in seen.items() if not math.isfinite(value)]
    if broken:
        return (
            f"not finite: {', '.join(broken)}. Look at images, augmentation and weights for NaN or inf; lower the "
            "learning rate, clip gradients, use bf16 instead of fp16"
        )
    for case in (_teacher_stands, _one_hot, _uniform, _low_rank, _dead_prototypes, _large_k, _few_rows):
        found = case(seen)
        if found is not None:
            return found
    return None


def _teacher_stands(seen: _Values) -> str | None:
    if seen["teacher_follows"] == 0:
        return (
            "teacher does not follow: its weights are bitwise unchanged, while the student's have changed. Add "
            "TeacherUpdateCallback to the Trainer, with pairs that name this teacher, and a momentum below 1"
        )
    return None


def _one_hot(seen: _Values) -> str | None:
    if seen["prototype_perplexity"] < min(FEW_PROTOTYPES, 0.75 * seen["output_dim"]):
        return (
            f"one-hot collapse: all {seen.rows} get the same prototype (effective number "
            f"{seen['prototype_perplexity']:.2f} of {seen['output_dim']:.0f}, teacher entropy "
            f"{seen['teacher_entropy']:.3f} nats, KL {seen['kl']:.3f}). "
            "Check that the center is updated (center_momentum below 1, the loss in train mode) or use "
            "centering='sinkhorn', raise the teacher temperature (teacher_temp), and resume from an earlier checkpoint"
        )
    return None


def _uniform(seen: _Values) -> str | None:
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


def _low_rank(seen: _Values) -> str | None:
    if seen["rankme"] < LOW_RANK:
        return (
            f"dimensional collapse: the effective rank of the embeddings (RankMe) is {seen['rankme']:.2f}: they all "
            "point in much the same direction. Check that the images differ after normalisation, lower the learning "
            "rate, or (DINO only; DINOv2's heads have none) use batch norm in the head"
        )
    return None


def _dead_prototypes(seen: _Values) -> str | None:
    used, count, rows = seen["prototypes_used"] * seen["output_dim"], seen["output_dim"], seen["rows"]
    reachable = count * -math.expm1(rows * math.log1p(-1 / count)) if count > 1 else math.nan  # by `rows` random draws
    if used < DEAD * reachable:
        return (
            f"dead prototypes: {used:.0f} of {count:.0f} win for any of {rows:.0f} rows, where random ones would reach "
            f"{reachable:.0f}. If the {seen.rows} are of more kinds than that, freeze the last layer for longer or use "
            "centering='sinkhorn'; otherwise it is harmless, and a smaller output_dim saves time"
        )
    return None


def _large_k(seen: _Values) -> str | None:
    is_flat = seen["loss_normalized"] > LARGE_LOSS and abs(seen["loss_change"]) < FLAT
    if is_flat and seen["output_dim"] >= LARGE_K:
        return (
            f"no collapse: the loss of {seen['loss']:.2f} nats is flat at {seen['loss_normalized']:.2f} ln K because K "
            f"= {seen['output_dim']:.0f} is large: {seen['teacher_entropy']:.2f} of it are the teacher's own entropy, "
            f"which no student can lower, and {seen['kl']:.2f} are KL, in which it learns. Watch KL and kNN; a lower "
            "teacher temperature or fewer prototypes lower the entropy"
        )
    return None


def _few_rows(seen: _Values) -> str | None:
    if seen["sinkhorn_rows"] < seen["output_dim"]:
        return (
            f"few samples for Sinkhorn: a batch has {seen['sinkhorn_rows']:.0f} rows ({seen.rows}, all processes) for "
            f"{seen['output_dim']:.0f} prototypes, less than one for each. The authors also train with fewer rows than "
            "prototypes; this is harmless if many prototypes are used (prototype perplexity). Otherwise, use a larger "
            "batch, a smaller output_dim or centering='mean'"
        )
    return None
