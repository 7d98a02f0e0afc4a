from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.outputs import factors, logits

from dino_head import FactoredLogits
from dino_head.functional import sinkhorn_center

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.mark.parametrize("iterations", [1, 3, 5])
@pytest.mark.parametrize("factored", [True, False])
def test_sinkhorn_equals_the_reference(iterations, factored):
    values = {name: torch.from_numpy(value) for name, value in np.load(REFERENCE / "sinkhorn_dinov2.npz").items()}
    temp, logits = float(values["temp"]), values["teacher"].unsqueeze(0)  # (1, N, K)
    out = FactoredLogits(logits, torch.eye(logits.shape[-1])) if factored else logits
    center = sinkhorn_center(out, temp, iterations=iterations, block_bytes=2000)
    expected = values[f"probs_{iterations}"]
    torch.testing.assert_close(((logits[0] - center) / temp).softmax(dim=-1), expected, rtol=1e-5, atol=1e-6)


def test_sinkhorn_takes_the_samples_of_all_views_together():
    teacher, _, _ = factors(dtype=torch.float64)
    logits = teacher.logits()
    mass = (logits.flatten(0, 1) / 0.1).exp().T  # (K, T B), as the paper writes it
    for _ in range(3):
        mass = mass / mass.sum(dim=1, keepdim=True)
        mass = mass / mass.sum(dim=0, keepdim=True)
    for out, size in ((logits, 1), (teacher, 1), (teacher, 2**20)):
        center = sinkhorn_center(out, 0.1, block_bytes=size)
        found = ((logits - center) / 0.1).softmax(dim=-1).flatten(0, 1)
        torch.testing.assert_close(found, mass.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [3.0, 1e4])
def test_sinkhorn_is_finite_where_the_exponential_is_not(scale):
    torch.manual_seed(0)
    logits = scale * torch.randn(2, 16, 64)
    assert not (logits / 0.07).exp().isfinite().all()
    center = sinkhorn_center(logits, 0.07)
    assert center.isfinite().all()
    probabilities = ((logits - center) / 0.07).softmax(dim=-1)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, 16))


def test_sinkhorn_spreads_the_samples_over_the_prototypes():
    teacher, _, _ = factors(samples=100, outputs=20)
    logits = teacher.logits() + torch.linspace(0, 1, 20)  # the last prototypes are far ahead
    center = sinkhorn_center(logits, 0.1, iterations=30)
    shares = ((logits - center) / 0.1).softmax(dim=-1).mean(dim=(0, 1))
    torch.testing.assert_close(shares, torch.full((20,), 1 / 20), rtol=1e-2, atol=0)
    assert (logits / 0.1).softmax(dim=-1).mean(dim=(0, 1)).max() > 0.2


@pytest.mark.parametrize(
    ("temp", "options", "message"),
    [(0.0, {}, "teacher_temp must be"), (0.1, {"iterations": 0}, "iterations must be an integer >= 1, got 0")],
)
def test_arguments_of_sinkhorn(temp, options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_center(logits(2, 3, 16), temp, **options)
