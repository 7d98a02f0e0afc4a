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


@pytest.mark.parametrize(
    ("step", "value"),
    # 3 warm-up steps from 0 to 1, then a cosine to 0.2 over the 4 steps 3 to 6, and 0.2 from step 7 on.
    [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.0), (5, 0.6), (7, 0.2), (8, 0.2), (1000, 0.2)],
)
def test_cosine_step_by_step(step, value):
    result = cosine_schedule(step, 1.0, 0.2, 7, warmup_steps=3)
    assert result == pytest.approx(value)
    assert isinstance(result, float)


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
