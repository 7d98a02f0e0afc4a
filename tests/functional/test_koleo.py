import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import distributed_fits
from helpers.host_reads import HostReads
from helpers.processes import run_in_processes

from dino_head import koleo_loss

REFERENCE = Path(__file__).parents[1] / "reference"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def features(samples=10, width=6, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(samples, width).to(dtype).requires_grad_()


def loss_and_gradient(x, **options):
    loss = koleo_loss(x, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def from_the_definition(x, topk=1):
    """A loop over samples in float64."""
    units = [row / row.norm().clamp_min(1e-8) for row in x.double()]
    logs = []
    for i, unit in enumerate(units):
        others = sorted((other for j, other in enumerate(units) if j != i), key=lambda other: -(unit @ other).item())
        logs += [((unit - other + 1e-8).norm() + 1e-8).log() for other in others[:topk]]
    return -torch.stack(logs).mean()


@pytest.mark.parametrize(
    ("file", "topk", "prefix"),
    [("koleo_dinov2", 1, "")] + [("koleo_dinov3_topk", topk, f"topk{topk}/") for topk in (1, 2, 4)],
)
def test_loss_and_gradient_equal_the_reference(file, topk, prefix):
    values = {name: torch.from_numpy(value) for name, value in np.load(REFERENCE / f"{file}.npz").items()}
    loss, gradient = loss_and_gradient(values["x"].requires_grad_(), topk=topk)
    torch.testing.assert_close(loss, values[prefix + "loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, values[prefix + "grad"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("topk", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_equal_the_definition(topk, dtype):
    x = features(dtype=dtype)
    loss, gradient = loss_and_gradient(x, topk=topk)
    expected = from_the_definition(x, topk)
    (expected_gradient,) = torch.autograd.grad(expected, x)
    assert loss.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(loss, expected.to(dtype).detach(), rtol=rtol, atol=rtol)
    torch.testing.assert_close(gradient, expected_gradient, rtol=rtol, atol=rtol)


def test_the_parts_of_a_batch_average_to_its_loss():
    x = features(samples=9)
    parts = [koleo_loss(x[i : i + 3], topk=2, candidates=x, offset=i) for i in (0, 3, 6)]
    expected, gradient = loss_and_gradient(x, topk=2)
    torch.testing.assert_close(torch.stack(parts).mean(), expected)
    torch.testing.assert_close(torch.autograd.grad(sum(parts) / 3, x)[0], gradient)


def test_one_sample_a_process_is_enough_with_candidates():
    x = features(samples=2)
    torch.testing.assert_close(koleo_loss(x[1:], candidates=x, offset=1), koleo_loss(x))


@pytest.mark.distributed
def test_two_processes_that_gather_equal_one_on_the_joined_batch(tmp_path):
    """The gradient of the sum of both losses reaches x; DDP divides it by their number."""
    expected = distributed_fits.spread_features(tmp_path)
    ranks = run_in_processes(distributed_fits.spread_features, tmp_path)
    torch.testing.assert_close(sum(rank["loss"] for rank in ranks) / 2, expected["loss"], rtol=1e-5, atol=1e-6)
    for index, rank in enumerate(ranks):
        own = slice(index, None, 2)  # the sampler's part of the batch
        torch.testing.assert_close(rank["x"] / 2, expected["x"][own], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank["weight"], expected["weight"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("copies", "samples"), [(2, 6), (3, 6), (4, 4)])
@pytest.mark.parametrize("topk", [1, 2])
def test_duplicates_have_finite_gradients(dtype, copies, samples, topk):
    x = features(samples=samples, dtype=dtype)
    x.data[:copies] = x.data[0].clone()
    loss, gradient = loss_and_gradient(x, topk=topk)
    assert loss.isfinite()
    assert loss > math.log(2)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [1, 2, 6])
def test_vectors_of_zeros_have_finite_gradients(dtype, zeros):
    x = features(samples=6, dtype=dtype)
    x.data[:zeros] = 0
    loss, gradient = loss_and_gradient(x)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[:zeros] == 0).all()


def test_duplicates_keep_the_loss_of_the_definition():
    x = features().detach()
    x[1] = 2 * x[0]
    torch.testing.assert_close(koleo_loss(x.double()), from_the_definition(x))


@pytest.mark.parametrize("scale", [1e-7, 1e-9])
def test_short_vectors_are_divided_by_the_epsilon(scale):
    x = scale * features(dtype=torch.float64).detach()
    torch.testing.assert_close(koleo_loss(x), from_the_definition(x))


def test_antipodal_vectors_are_each_others_neighbours():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss, gradient = loss_and_gradient(x)
    assert loss.item() == pytest.approx(-math.log(2), rel=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(dtype):
    x = features(dtype=dtype)
    loss, gradient = loss_and_gradient(x)
    expected, expected_gradient = loss_and_gradient(x.float())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, expected_gradient.to(dtype))


def test_under_autocast_the_nearest_of_a_dense_cluster_is_found():
    torch.manual_seed(0)
    angles = 0.01 * torch.rand(20)
    x = torch.stack([angles.cos(), angles.sin()], dim=1).requires_grad_()
    assert len((x @ x.T).bfloat16().unique()) == 1
    expected, gradient = loss_and_gradient(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, under_autocast = loss_and_gradient(x)
    assert torch.equal(loss, expected)
    assert torch.equal(under_autocast, gradient)


def test_nan_is_not_hidden():
    x = features().detach()
    x[3, 2] = torch.nan
    assert koleo_loss(x).isnan()
    assert koleo_loss(x[:2], candidates=x).isnan()


def test_the_host_reads_no_values():
    x = features()
    with HostReads() as reads:
        koleo_loss(x, topk=2).backward()
        koleo_loss(x[5:10], candidates=x[:10], offset=5).backward()
    assert not reads.counts


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(dynamic):
    def loss_of_half_and_all(x):
        return koleo_loss(x[2:4], topk=2, candidates=x, offset=2) + koleo_loss(x)

    compiled = torch.compile(loss_of_half_and_all, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for samples in (6, 8):
        x = features(samples=samples)
        found, expected = (torch.autograd.grad(function(x), x)[0] for function in (compiled, loss_of_half_and_all))
        torch.testing.assert_close(compiled(x), loss_of_half_and_all(x))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 4, 8), {}, r"expects floating-point x of shape \(samples, features\), got \(2, 4, 8\) in torch.float32"),
        ((1, 8), {}, "needs a sample and 2 candidates, got 1 and 1: use a larger batch"),
        ((0, 8), {"candidates": torch.zeros(4, 8)}, "needs a sample and 2 candidates, got 0 and 4"),
        ((4, 8), {"topk": 4}, "has 3 other candidates for each sample, got topk=4: use a smaller topk"),
        ((4, 8), {"topk": 0}, "topk must be an integer >= 1, got 0"),
        ((4, 8), {"candidates": torch.zeros(8, 4)}, "the same number of features, got 8 and 4"),
        ((4, 8), {"candidates": torch.zeros(2, 4, 8)}, r"floating-point candidates of shape .*, got \(2, 4, 8\)"),
        ((4, 8), {"candidates": torch.zeros(8, 8).long()}, r"got \(8, 8\) in torch.int64"),
        ((4, 8), {"candidates": torch.zeros(8, 8), "offset": -4}, "offset must be an integer >= 0, got -4"),
        ((4, 8), {"candidates": torch.zeros(8, 8), "offset": 8}, "got 4 samples, 8 candidates and offset=8"),
        ((4, 8), {"candidates": torch.zeros(8, 8), "offset": 2}, "got 4 samples, 8 candidates and offset=2"),
        ((4, 8), {"candidates": torch.zeros(7, 8), "offset": 0}, "got 4 samples, 7 candidates and offset=0"),
        ((4, 8), {"offset": 4}, "got 4 samples, 4 candidates and offset=4. .* offset=rank"),
    ],
)
def test_sizes_that_do_not_fit_raise(shape, options, message):
    with pytest.raises(ValueError, match=message):
        koleo_loss(torch.zeros(shape), **options)


def test_features_of_integers_are_refused():
    with pytest.raises(ValueError, match=r"got \(4, 8\) in torch.int64"):
        koleo_loss(torch.zeros(4, 8, dtype=torch.int64))


@pytest.mark.parametrize(("place", "offset"), [(6, 0), (0, 6), (None, 6)])
def test_candidates_without_x_at_the_offset_make_the_loss_nan(place, offset):
    """As with a forgotten offset: each sample would be its own neighbour."""
    x, candidates = torch.randn(6, 8), torch.randn(12, 8)
    if place is not None:
        candidates[place : place + 6] = x
        assert koleo_loss(x, candidates=candidates, offset=place).isfinite()
    assert koleo_loss(x, candidates=candidates, offset=offset).isnan()
