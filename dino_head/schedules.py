"""Schedules: pure functions from a step or an epoch to a float."""

import math

from dino_head._arguments import check_integer


def cosine_schedule(
    step: int,
    start: float,
    end: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
) -> float:
    """Cosine from `start` to `end`, after a linear warm-up.

        start at step w, end at step N:  end + (start - end) (1 + cos(pi (step - w) / (N - w))) / 2

    DINO uses it for the learning rate, the weight decay (0.04 to 0.4) and the teacher's momentum (0.996 to 1).
    As the authors write it, the value is `end` at step N itself, one past the last step of the run, and stays there.

    Args:
        step: optimizer steps taken so far.
        start: value at the end of the warm-up.
        end: value from `total_steps` on.
        total_steps: N, optimizer steps of the whole run.
        warmup_steps: w, optimizer steps of the warm-up; its last one has reached `start`.
        warmup_start: value at step 0 of the warm-up.

    >>> [round(cosine_schedule(step, 0.996, 1.0, 4), 4) for step in range(6)]
    [0.996, 0.9966, 0.998, 0.9994, 1.0, 1.0]
    """
    if step < warmup_steps:
        return warmup_start + (start - warmup_start) * step / max(warmup_steps - 1, 1)
    if step >= total_steps:
        return float(end)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def teacher_temperature(epoch: int | None, warmup_start: float, final: float, warmup_epochs: int) -> float:
    """Linear warm-up of the teacher's temperature over epochs: `linspace(warmup_start, final, n)[epoch]`, then `final`.

    Args:
        epoch: the current epoch; None: the final temperature.
        warmup_start: temperature in epoch 0.
        final: temperature from epoch n - 1 on.
        warmup_epochs: n; 1 gives `warmup_start` in epoch 0, 0 the final temperature always.

    >>> [round(teacher_temperature(epoch, 0.04, 0.07, 4), 4) for epoch in (0, 1, 2, 3, 4, None)]
    [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]
    """
    if epoch is not None:
        check_integer("epoch", epoch, 0)
    if epoch is None or epoch >= warmup_epochs:
        return float(final)
    return warmup_start + (final - warmup_start) * epoch / max(warmup_epochs - 1, 1)
