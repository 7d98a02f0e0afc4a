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
    """Value of a cosine from `start` to `end`, after an optional linear warm-up.

        start at step w, end at step N:  end + (start - end) (1 + cos(pi (step - w) / (N - w))) / 2

    DINO uses it for the learning rate, the weight decay (0.04 to 0.4) and the teacher's momentum (0.996 to 1).
    As in the authors' code, the value reaches `end` at step N, one past the last step of the run, and stays there.

    Args:
        step: Number of optimizer steps taken so far, >= 0.
        start: Value at the end of the warm-up.
        end: Value from `total_steps` on.
        total_steps: Number N of optimizer steps of the whole run.
        warmup_steps: Number w of optimizer steps of the warm-up, the last of which has the value `start`.
        warmup_start: Value at step 0 of the warm-up.

    Raises:
        ValueError: A negative step, or a warm-up that is negative or longer than the schedule.

    >>> [round(cosine_schedule(step, 0.996, 1.0, 4), 4) for step in range(6)]
    [0.996, 0.9966, 0.998, 0.9994, 1.0, 1.0]
    """
    if step < 0:
        raise ValueError(f"step must be the number of optimizer steps taken so far, at least 0, got {step}")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"the warm-up must fit into the schedule, got warmup_steps={warmup_steps} and total_steps={total_steps}: "
            "shorten the warm-up, or train for longer"
        )
    if step < warmup_steps:
        return warmup_start + (start - warmup_start) * step / max(warmup_steps - 1, 1)
    if step >= total_steps:
        return float(end)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def teacher_temperature(epoch: int | None, warmup_start: float, final: float, warmup_epochs: int) -> float:
    """Linear warm-up of the teacher's temperature over epochs: `linspace(warmup_start, final, n)[epoch]`, then `final`.

    Args:
        epoch: Current epoch; None for the final temperature.
        warmup_start: Temperature in epoch 0.
        final: Temperature from epoch n - 1 on.
        warmup_epochs: Length n of the warm-up in epochs; with 1, epoch 0 has `warmup_start`; with 0, every epoch has
            the final temperature.

    >>> [round(teacher_temperature(epoch, 0.04, 0.07, 4), 4) for epoch in (0, 1, 2, 3, 4, None)]
    [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]
    """
    if epoch is not None:
        check_integer("epoch", epoch, 0, " (such as self.current_epoch)")
    if epoch is None or epoch >= warmup_epochs:
        return float(final)
    return warmup_start + (final - warmup_start) * epoch / max(warmup_epochs - 1, 1)
