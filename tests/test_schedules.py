from pathlib import Path

import numpy as np
import pytest

from dino_head import cosine_schedule
from dino_head.schedules import teacher_temperature

FIGURES = np.load(Path(__file__).parent / "reference" / "schedules.npz")


@pytest.mark.parametrize("name", ["dino0", "dino1", "dino2", "dino3"])
def test_equals_the_authors_schedule(name):
    start, end, epochs, steps_per_epoch, warmup_epochs, warmup_start = FIGURES[f"{name}/args"].tolist()
    expected = FIGURES[f"{name}/values"]
    values = [
        cosine_schedule(
            step,
            start,
            end,
            int(epochs * steps_per_epoch),
            warmup_steps=int(warmup_epochs * steps_per_epoch),
            warmup_start=warmup_start,
        )
        for step in range(len(expected))
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["dinov20", "dinov21", "dinov22"])
def test_composed_with_a_pause_equals_dinov2s_schedule(name):
    """DINOv2 may hold the learning rate at 0 for some steps first (its last layer's): the schedule, begun later."""
    start, end, steps, warmup_steps, warmup_start, pause = FIGURES[f"{name}/args"].tolist()
    expected = FIGURES[f"{name}/values"]
    assert len(expected) == steps

    def value(step):
        if step < pause:
            return 0.0
        options = {"warmup_steps": int(warmup_steps), "warmup_start": warmup_start}
        return cosine_schedule(step - int(pause), start, end, int(steps - pause), **options)

    np.testing.assert_allclose([value(step) for step in range(int(steps))], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("step", "value"),
    # 3 warm-up steps from 0 to 1, then a cosine to 0.2 over the 4 steps 3 to 6, and 0.2 from step 7 on.
    [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.0), (5, 0.6), (7, 0.2), (8, 0.2), (1000, 0.2)],
)
def test_cosine_step_by_step(step, value):
    result = cosine_schedule(step, 1.0, 0.2, 7, warmup_steps=3)
    assert result == pytest.approx(value)
    assert isinstance(result, float)


def test_a_warm_up_may_fill_the_schedule():
    assert [cosine_schedule(step, 1.0, 0.2, 3, warmup_steps=3) for step in range(5)] == [0.0, 0.5, 1.0, 0.2, 0.2]


@pytest.mark.parametrize(("step", "total_steps", "warmup_steps", "message"), [
    (-1, 7, 3, "step must be .* at least 0, got -1"),
    (-1, 7, 0, "step must be .* at least 0, got -1"),
    (0, 7, 8, "got warmup_steps=8 and total_steps=7: shorten the warm-up, or train for longer"),
    (9, 7, 8, "got warmup_steps=8 and total_steps=7"),
    (5, 7, -2, "must fit into the schedule, got warmup_steps=-2"),
])  # fmt: skip
def test_a_schedule_refuses_negative_steps_and_a_warm_up_that_does_not_fit(step, total_steps, warmup_steps, message):
    with pytest.raises(ValueError, match=message):
        cosine_schedule(step, 1.0, 0.2, total_steps, warmup_steps=warmup_steps)


@pytest.mark.parametrize(
    ("epochs", "values"),
    [
        (0, [0.07, 0.07, 0.07]),
        (1, [0.04, 0.07, 0.07]),
        (2, [0.04, 0.07, 0.07]),
        (4, [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]),
    ],
)
def test_teacher_temperature(epochs, values):
    assert [teacher_temperature(epoch, 0.04, 0.07, epochs) for epoch in range(len(values))] == pytest.approx(values)
    assert teacher_temperature(None, 0.04, 0.07, epochs) == 0.07
