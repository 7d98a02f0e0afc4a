import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import distributed_parts
from helpers.operations import Watch
from helpers.outputs import factored, factors, logits
from helpers.processes import run_in_processes

from dino_head import FactoredLogits, dino_loss
from dino_head.functional import sinkhorn_center
from dino_head.functional.dino import reference_dino_loss

REFERENCE = Path(__file__).parents[1] / "reference"
VIEWS = [(1, 2), (1, 4), (2, 2), (2, 5), (3, 3), (3, 5)]
OPTIONS = {"teacher_temp": 0.07, "student_temp": 0.1}


@pytest.mark.parametrize("name", ["loss_dino", "loss_nidl"])
def test_the_plain_reference_equals_the_values_of_other_implementations(name):
    """The first call of each: a center of zeros, and the temperature of epoch 0."""
    values = {key: torch.from_numpy(value) for key, value in np.load(REFERENCE / f"{name}.npz").items()}
    assert values["0/epoch"] == 0
    student = values["0/student"].requires_grad_()
    loss = reference_dino_loss(values["0/teacher"], student, teacher_temp=0.04, student_temp=0.1)
    loss.backward()
    torch.testing.assert_close(loss.float(), values["0/loss"].reshape(()), rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad, values["0/grad_student"], rtol=1e-4, atol=1e-7)


def test_the_plain_reference_subtracts_the_center():
    torch.manual_seed(0)
    teacher, student, center = torch.randn(2, 3, 7), torch.randn(4, 3, 7), torch.randn(7)
    shifted = reference_dino_loss(teacher - center, student)
    torch.testing.assert_close(reference_dino_loss(teacher, student, center=center), shifted, rtol=1e-5, atol=0)
    assert not torch.isclose(reference_dino_loss(teacher, student), shifted, rtol=1e-2)


@pytest.mark.parametrize("samples_in_a_block", [0, 1, 3, 7])  # 0: not even one fits
@pytest.mark.parametrize(("views_t", "views_s"), VIEWS)
def test_loss_and_gradients_from_logits_and_from_blocks_equal_the_plain_reference(views_t, views_s, samples_in_a_block):
    truth_t, truth_s, truth_center = factors(views_t, views_s, dtype=torch.float64)
    truth = reference_dino_loss(truth_t.logits(), truth_s.logits(), center=truth_center.flatten())
    gradients = torch.autograd.grad(truth, truth_s)
    teacher, student, center = factors(views_t, views_s)
    size = max(1, samples_in_a_block * (views_t + views_s + 1) * 200 * 4)
    for out in ((teacher, student), (teacher.logits(), student.logits())):
        value = dino_loss(*out, center=center, block_bytes=size, **OPTIONS)
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)
        for ours, expected in zip(torch.autograd.grad(value, student), gradients, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("views", [(1, 2), (2, 2), (2, 4)])
def test_gradients_in_float64(views):
    teacher, student, center = factors(*views, samples=3, width=4, outputs=5, dtype=torch.float64)

    def factored(z, prototypes):
        return dino_loss(
            teacher, FactoredLogits(z, prototypes), center=center, block_bytes=2 * 5 * 8 * (sum(views) + 1)
        )

    assert torch.autograd.gradcheck(factored, tuple(student))
    assert torch.autograd.gradcheck(
        lambda s: dino_loss(teacher.logits(), s), student.logits().detach().requires_grad_()
    )


@pytest.mark.parametrize("views", [[2, 3], [1, 4]])
def test_lists_of_views_are_stacked(views):
    teacher, student, _ = factors(*views)
    teacher, student = teacher.logits(), student.logits().detach().requires_grad_()
    stacked = dino_loss(teacher, student)
    (expected,) = torch.autograd.grad(stacked, student)
    chunks = student.flatten(0, 1).chunk(len(student))  # as the authors' loop makes them
    listed = dino_loss(list(teacher), chunks)
    assert torch.equal(listed, stacked)
    assert torch.equal(torch.autograd.grad(listed, student)[0], expected)


@pytest.mark.parametrize("factored", [True, False])
def test_views_may_be_strided(factored):
    teacher, student, _ = factors()

    def strided(tensor):  # the same values, batch first in memory
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    sides = [FactoredLogits(strided(z), strided(w)) for z, w in (teacher, student)]
    out = sides if factored else [strided(side.logits()) for side in sides]
    value = dino_loss(*out, block_bytes=30_000)
    expected = dino_loss(teacher.logits(), student.logits())
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(value, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(200,), (1, 200), (1, 1, 200), (200, 1)])
def test_centers_of_any_shape(shape):
    teacher, student, center = factors(samples=200)
    expected = dino_loss(teacher, student, center=center)
    assert dino_loss(teacher, student, center=center.reshape(shape)).item() == expected.item()


def test_the_teacher_gets_no_gradient():
    teacher, student, _ = factors()
    teacher = FactoredLogits(*(tensor.clone().requires_grad_() for tensor in teacher))
    dino_loss(teacher, student).backward()
    assert [tensor.grad for tensor in teacher] == [None, None]
    assert all(tensor.grad.abs().sum() > 0 for tensor in student)


@pytest.mark.parametrize("factored", [True, False])
def test_inputs_are_left_as_they_are(factored):
    teacher, student, center = factors()
    inputs = [*teacher, *student, center] if factored else [teacher.logits(), student.logits().detach(), center]
    before = [tensor.clone() for tensor in inputs]
    out = (teacher, student) if factored else (inputs[0], inputs[1].requires_grad_())
    dino_loss(*out, center=center).backward()
    assert all(map(torch.equal, inputs, before))


# What is kept from forward to backward.


@pytest.mark.parametrize("factored", [True, False])
def test_two_backwards_give_twice_the_gradient(factored):
    teacher, student, _ = factors()
    leaves = tuple(student) if factored else (student.logits().detach().requires_grad_(),)
    out = (teacher, student) if factored else (teacher.logits(), *leaves)
    once = torch.autograd.grad(dino_loss(*out), leaves)
    loss = dino_loss(*out)
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        assert torch.equal(leaf.grad, 2 * gradient)


@pytest.mark.parametrize("factored", [True, False])
def test_a_double_backward_raises(factored):
    teacher, student, _ = factors()
    leaf = student.z if factored else student.logits().detach().requires_grad_()
    loss = dino_loss(teacher, student) if factored else dino_loss(teacher.logits(), leaf)
    loss = 3 * loss
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        (loss + gradient.square().sum()).backward()


def test_a_scaled_loss_scales_the_gradients():
    teacher, student, _ = factors()
    once = torch.autograd.grad(dino_loss(teacher, student), student)
    scaled = torch.autograd.grad(dino_loss(teacher, student) * 2.0**16, student)
    assert all(torch.equal(a * 2.0**16, b) for a, b in zip(once, scaled, strict=True))


def test_a_grad_scaler_finds_what_float16_would_have_lost():
    teacher, student, _ = factors(samples=64, outputs=1000)
    truth = torch.autograd.grad(dino_loss(teacher, student), student)
    halves = FactoredLogits(*(tensor.detach().half().requires_grad_() for tensor in student))
    with torch.autocast("cpu", torch.float16):
        loss = dino_loss(teacher, halves)
    for ours, expected in zip(torch.autograd.grad(loss * 2.0**14, halves), truth, strict=True):
        assert ours.dtype == torch.float16  # of the tensor it belongs to
        assert (ours.float() / 2.0**14 - expected).norm() < 0.005 * expected.norm()
        assert (ours == 0).float().mean() < (expected.half() == 0).float().mean() + 0.001


@pytest.mark.parametrize("factored", [True, False])
def test_without_grad_mode_nothing_is_computed_for_it(factored):
    teacher, student, _ = factors()
    expected = dino_loss(teacher, student)
    with torch.no_grad(), Watch() as watch:
        value = dino_loss(teacher, student) if factored else dino_loss(teacher.logits(), student.logits())
    torch.testing.assert_close(value, expected.detach())
    assert not value.requires_grad
    assert watch.products == 2  # the logits of both sides


@pytest.mark.parametrize(("needs_z", "needs_prototypes"), [(True, True), (True, False), (False, True)])
def test_only_the_products_that_are_asked_for_are_computed(needs_z, needs_prototypes):
    teacher, student, _ = factors()
    expected = torch.autograd.grad(dino_loss(teacher, student), student)
    leaves = FactoredLogits(
        student.z.detach().requires_grad_(needs_z), student.prototypes.detach().requires_grad_(needs_prototypes)
    )
    with Watch() as watch:
        dino_loss(teacher, leaves).backward()
    assert watch.products == 2 + needs_z + needs_prototypes
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)


# Memory and precision.


@pytest.mark.parametrize(
    "work", [dino_loss, lambda teacher, student, **options: sinkhorn_center(teacher, 0.1, **options)]
)
def test_no_more_than_a_block_of_logits_is_in_memory(work):
    teacher, student, _ = factors(samples=64, outputs=2000)
    budget = 8 * (2 + 5 + 1) * 2000 * 4
    with Watch() as watch:
        work(teacher, student, block_bytes=budget)
    assert 2000 * 16 < watch.largest <= budget // 4
    with Watch() as watch:
        work(teacher.logits(), student.logits(), block_bytes=budget)
    assert watch.largest >= 2 * 64 * 2000  # it can fail


def test_autocast_leaves_float64_alone():
    teacher, student, _ = factors(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        value = dino_loss(teacher, student)
    assert value.item() == dino_loss(teacher, student).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_make_a_float32_loss(dtype):
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 16).to(dtype), torch.randn(4, 3, 16).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        value = dino_loss(teacher, student)
    torch.testing.assert_close(value, dino_loss(teacher.float(), student.float()))
    assert torch.autograd.grad(value, student)[0].dtype == dtype


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_finite_at_any_scale_of_the_logits(scale):
    torch.manual_seed(0)
    teacher, student = scale * torch.randn(2, 3, 50), (scale * torch.randn(4, 3, 50)).requires_grad_()
    value = dino_loss(teacher, student)
    value.backward()
    truth = reference_dino_loss(teacher, student.detach())
    assert value.item() == pytest.approx(truth.item(), rel=1e-5)
    assert student.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated")  # the compiler's own
def test_compiled_without_a_graph_break(factored):
    teacher, student, center = factors()
    leaves = tuple(student) if factored else (student.logits().detach().requires_grad_(),)
    out = (teacher, student) if factored else (teacher.logits(), *leaves)
    compiled = torch.compile(lambda *out: dino_loss(*out, center=center), backend="aot_eager", fullgraph=True)
    for value in (dino_loss(*out, center=center), compiled(*out)):
        gradients = torch.autograd.grad(value, leaves)
        reference = reference_dino_loss(
            teacher.logits(), student.logits() if factored else leaves[0], center=center.flatten()
        )
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients, torch.autograd.grad(reference, leaves), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_temp": 0}, "teacher_temp must be a number"),
        ({"student_temp": -1}, "student_temp must be a number"),
        ({"center": torch.zeros(8)}, r"one value for each of K = 16 prototypes, got \(8,\)"),
        ({"block_bytes": 0}, "block_bytes must be an integer >= 1"),
    ],
)
def test_arguments_of_the_loss(options, message):
    with pytest.raises(ValueError, match=message):
        dino_loss(logits(2, 3, 16), logits(4, 3, 16), **options)


def test_uniform_sides_cost_ln_k():
    assert dino_loss(factored(2, 3, 4, 16), factored(4, 3, 4, 16)).item() == pytest.approx(math.log(16))


# Sharded.


@pytest.mark.distributed
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of this torch needs a GPU")
def test_under_fully_shard_gradients_are_exact(tmp_path):
    results = run_in_processes(distributed_parts.sharded_heads, tmp_path)
    for rank in results:
        for index, norm_last_layer in enumerate((True, False, None)):
            head, views = distributed_parts.sharded_case(norm_last_layer)
            distributed_parts.head_loss(head, views).backward()
            found = rank[index]
            expected = {name: p.grad for name, p in head.named_parameters() if p.requires_grad}
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                largest = gradient.abs().max().item()
                assert largest > 0
                torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * largest)
